"""The example that asks where knowing the demand pays, on a few jobs, and its mixes."""

import json
import os
from pathlib import Path

import pytest

from demand import Oracle, simulate

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("PICACHE_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def example(monkeypatch):
    if not (DATA / "tau_bench").exists():
        pytest.skip(f"no tau_bench: set PICACHE_DATA to its folder (looked in {DATA})")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "experiments"))
    import knowing_demand

    return knowing_demand


def test_the_record_has_what_its_tables_say(example, monkeypatch, tmp_path, capsys):
    from knowing_mixes import tau_bench

    few = list(tau_bench(DATA))
    monkeypatch.setattr(example, "mixes", lambda folder: iter(few))
    monkeypatch.setattr("sys.argv", f"x --out {tmp_path} --jobs 60 --seeds 2 --loads 0.8".split())
    example.main()
    record = json.loads((tmp_path / "knowing_demand.json").read_text())
    assert len(record["found"]) == sum(len(mix.labels) for mix in few)
    for found in record["found"]:
        rows = found["rows"]
        assert {"random", "FCFS", "LAS", "class mean", "Gittins", "oracle"} <= set(rows)
        over = "mean_seconds_over_class mean"
        ratios = {name: row[over]["estimate"] for name, row in rows.items()}
        assert ratios["class mean"] == 1.0
        assert ratios["oracle"] == min(ratios.values())
        if found["labels"] == "none":
            assert ratios["FCFS"] == 1.0
            assert found["classes"] == 1
    said = capsys.readouterr().out
    for text in (*example.tables(record), example.tails(record)):
        assert text in said
    assert (tmp_path / "knowing_demand.png").stat().st_size > 10_000


def test_labels_change_what_is_known_and_not_the_jobs(example):
    from knowing_mixes import NO_LABELS, tau_bench

    (mix,) = tau_bench(DATA)
    fine, none = (mix.draw(label, 0.8, 50, seed=3) for label in mix.labels)
    assert NO_LABELS in mix.labels
    assert fine.demands.tolist() == none.demands.tolist()
    assert fine.arrivals.tolist() == none.arrivals.tolist()
    assert len(fine.distributions) == 30
    assert set(none.applications) == {"any"} == set(none.distributions)
    assert simulate(fine, Oracle()).mean == simulate(none, Oracle()).mean
    # what is known without labels is what is known with them, by the shares of the arrivals
    mean = sum(a.weight * a.distribution.mean() for a in mix.applications)
    assert none.distributions["any"].mean() == pytest.approx(
        mean / sum(a.weight for a in mix.applications)
    )
