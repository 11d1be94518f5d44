"""The harness of examples/experiments/schedule.py, on a few jobs."""

import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "experiments"


@pytest.fixture
def written(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import schedule
    import schedule_arms

    monkeypatch.setattr(schedule, "LOADS", (0.5, 0.9))
    monkeypatch.setattr(schedule_arms, "ENGINE_JOBS", 20)
    arguments = ["schedule.py", "--out", str(tmp_path), "--jobs", "60", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    schedule.main()
    assert (tmp_path / "scheduling.png").stat().st_size > 10_000
    return json.loads((tmp_path / "scheduling.json").read_text()), capsys.readouterr().out


def test_every_table_has_its_baselines_and_no_policy_beats_the_oracle(written):
    record, printed = written
    engines = ["hermes_engine_none", "hermes_engine_recompute"]
    names = [scenario["name"] for scenario in record["scenarios"]]
    assert names == ["hermes", "bimodal", "lognormal", "pareto", *engines, "hermes_deadlines"]
    assert list(record["claims"]) == ["load 0.5", "load 0.9", *engines]
    for scenario in record["scenarios"]:
        rows = {row["policy"]: row for row in scenario["rows"]}
        assert {"request FCFS", "FCFS", "LAS", "class mean", "SERPT", "Gittins"} <= set(rows)
        assert rows["FCFS"]["mean_seconds_over_fcfs"]["estimate"] == 1.0
        for row in rows.values():
            assert row["mean_seconds"]["low"] <= row["mean_seconds"]["estimate"]
            assert ("deadline_hits" in row) == (scenario["name"] == "hermes_deadlines")
            if scenario["name"] not in engines:  # SRPT is optimal on one server alone
                assert row["mean_seconds_over_oracle"]["estimate"] >= 1.0 - 1e-12
    assert printed.count("\n| oracle |") == 7


def test_the_page_shows_the_result_file(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import schedule

    docs = EXAMPLES.parents[1] / "docs"
    record = json.loads((docs / "results" / "scheduling.json").read_text())
    page = (docs / "when_gittins_helps.md").read_text()
    named = {scenario["name"]: scenario for scenario in record["scenarios"]}
    for shown in (
        schedule.claims_table(record["claims"]),
        schedule.gains_table(record["scenarios"]),
        schedule.table(named["hermes"]),
        schedule.table(named["hermes_deadlines"]),
    ):
        assert shown.count("\n| ") > 5
        assert shown in page
