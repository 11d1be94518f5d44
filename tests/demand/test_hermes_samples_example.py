"""The example that draws the paper's mix from samples, on a few jobs, and its page."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("PICACHE_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "experiments"))
    import hermes_samples

    return hermes_samples


def test_the_record_has_what_its_tables_say(example, monkeypatch, tmp_path, capsys):
    if not (DATA / "hermes_artifact").exists():
        pytest.skip(f"no hermes_artifact: set PICACHE_DATA to its folder (looked in {DATA})")
    command = f"x --data {DATA} --out {tmp_path} --jobs 20 --engine-jobs 8 --seeds 2"
    monkeypatch.setattr("sys.argv", command.split())
    example.main()
    record = json.loads((tmp_path / "hermes_samples.json").read_text())
    assert list(record["sources"]) == [example.TABLE, "pdgraphs.json", "task_models"]
    for source in record["sources"].values():
        assert len(source["demands"]) == 10
        shares = [row["share_of_work"] for row in source["demands"].values()]
        assert sum(shares) == pytest.approx(2.0)  # of the nine, and of the whole
        for rows in source["served"].values():
            assert rows["FCFS"]["below"]["FCFS"]["mean_seconds"]["estimate"] == 0.0
            assert {"random", "FCFS", "class mean", "oracle"} <= set(rows)
    places = 3 * len(record["sources"])
    said = capsys.readouterr().out
    for table in (example.claim_table, example.gains_table):
        assert len(table(record).splitlines()) == 2 + places
        assert table(record) in said
