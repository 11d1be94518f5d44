"""The harness of examples/schedule.py, on a few jobs."""

import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def written(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import schedule

    monkeypatch.setattr(schedule, "LOADS", (0.5, 0.9))
    arguments = ["schedule.py", "--out", str(tmp_path), "--jobs", "60", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    schedule.main()
    assert (tmp_path / "scheduling.png").stat().st_size > 10_000
    return json.loads((tmp_path / "scheduling.json").read_text()), capsys.readouterr().out


def test_every_table_has_its_baselines_and_no_policy_beats_the_oracle(written):
    record, printed = written
    names = [scenario["name"] for scenario in record["scenarios"]]
    assert names == ["hermes", "bimodal", "lognormal", "pareto", "hermes_deadlines"]
    assert [each["load"] for each in record["claim"]] == [0.5, 0.9]
    for scenario in record["scenarios"]:
        rows = {row["policy"]: row for row in scenario["rows"]}
        assert {"random", "FCFS", "LAS", "class mean", "SERPT", "Gittins", "oracle"} <= set(rows)
        for row in rows.values():
            assert row["mean_seconds_over_oracle"]["estimate"] >= 1.0 - 1e-12
            assert row["mean_seconds"]["low"] <= row["mean_seconds"]["estimate"]
            assert ("deadline_hits" in row) == (scenario["name"] == "hermes_deadlines")
    assert printed.count("| oracle |") == 5
