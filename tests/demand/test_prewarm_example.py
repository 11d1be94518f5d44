"""The harnesses of prewarming.py and of the two engine scripts in examples, on a few jobs."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from demand import hermes_applications

EXAMPLES = Path(__file__).parents[2] / "examples" / "experiments"


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, "--out", str(tmp_path), *arguments])
        module.main()
        return tmp_path, capsys.readouterr().out

    return run


def test_prewarming_writes_every_row_and_its_picture(example, monkeypatch):
    import prewarming

    monkeypatch.setattr(prewarming, "applications", partial(prewarming.applications, 50))
    monkeypatch.setattr(prewarming, "THRESHOLDS", (0.3, 0.7))
    monkeypatch.setattr(prewarming, "PRICES", (0.1,))
    folder, printed = example(prewarming, "--jobs", "25", "--seeds", "2")
    record = json.loads((folder / "prewarming.json").read_text())
    assert (folder / "prewarming.png").stat().st_size > 10_000
    for scenario in ("tools", "adapters"):
        rows = {r["prewarmer"]: r for r in record["rows"] if r["scenario"] == scenario}
        assert len(rows) == 8 + 2 + 2 + 1
        assert rows["none"]["reduction"] == {"estimate": 0.0, "low": 0.0, "high": 0.0}
        for row in rows.values():
            assert row["idle_seconds"]["low"] <= row["idle_seconds"]["estimate"]
            assert row["wait_seconds"]["estimate"] <= rows["none"]["wait_seconds"]["estimate"] + 1.0
    assert len(record["policies"]) == 2 * 5 * 3
    baselines = {row["policy"] for row in record["policies"]}
    assert baselines == {"FCFS", "random", "class mean", "Gittins", "oracle"}
    assert printed.count("| oracle |") == 2


def test_engine_writes_policies_modes_and_speed(example, monkeypatch):
    import engine

    monkeypatch.setattr(engine, "hermes_applications", partial(hermes_applications, 50))
    monkeypatch.setattr(engine, "SPEED_LOADS", (10.0,))
    monkeypatch.setattr(engine, "GROWTH_JOBS", (5, 10, 15))
    arguments = ["--jobs", "20", "--seeds", "2", "--speed-jobs", "10", "--repeats", "1"]
    arguments += ["--growth-jobs", "10"]
    folder, printed = example(engine, *arguments)
    record = json.loads((folder / "engine.json").read_text())
    fast = json.loads((folder / "engine_speed.json").read_text())
    assert {row["policy"] for row in record["policies"]} == set(engine.POLICIES)
    assert len(record["modes"]) == len(engine.MODES) * 3
    for row in record["modes"]:
        assert row["peak_blocks"] <= record["configuration"]["scarce_blocks"]
        assert (row["swapped_blocks_per_job"] > 0) <= (row["preemption"] == "swap")
    assert fast["speed"][0]["steps_per_second"] > 0
    assert [row["jobs"] for row in fast["growth"]] == [5, 5, 10, 10]
    assert printed.count("| oracle |") == 1


def test_recomputation_writes_a_row_for_each_mix_engine_and_policy(example, monkeypatch):
    import recomputation

    monkeypatch.setattr(recomputation, "hermes_applications", partial(hermes_applications, 50))
    folder, printed = example(recomputation, "--jobs", "15", "--seeds", "2")
    record = json.loads((folder / "recomputation.json").read_text())
    arms = 2 * len(recomputation.ENGINES) * len(recomputation.policies())
    assert len(record["rows"]) == arms
    for row in record["rows"]:
        if row["engine"] == "displaces nobody":
            assert row["prefilled_again_per_job"]["high"] == 0.0
    assert printed.count("labelled, oracle |") == 2


def test_engine_requests_writes_policies_applications_and_their_picture(example, monkeypatch):
    import engine_requests

    monkeypatch.setattr(engine_requests, "hermes_applications", partial(hermes_applications, 50))
    folder, printed = example(engine_requests, "--jobs", "20", "--seeds", "2")
    record = json.loads((folder / "engine_requests.json").read_text())
    assert (folder / "engine_requests.png").stat().st_size > 10_000
    for row in record["policies"]:
        for name in ("ttft", "tbt"):
            median, last = (row[f"p{percent}_{name}_seconds"]["estimate"] for percent in (50, 99))
            assert 0.0 < median <= last
        assert row["request_share"]["high"] <= 1.0
    named = [row["policy"] for row in record["applications"] if row["application"] == "all"]
    assert named == list(engine_requests.DRAWN)
    assert printed.count("| oracle |") == 1


def test_prefix_reuse_writes_a_row_for_each_rule_and_its_picture(
    example, monkeypatch, tmp_path, record_sessions
):
    import prefix_reuse

    record_sessions(8)
    monkeypatch.setattr(prefix_reuse, "SERVED", ((3.0, "request FCFS"), (3.0, "Gittins")))
    limits = ["--width", "3", "--token-budget", "500", "--blocks", "64"]
    written, printed = example(prefix_reuse, "--data", str(tmp_path), "--seeds", "2", *limits)
    record = json.loads((written / "prefix_reuse.json").read_text())
    assert (written / "prefix_reuse.png").stat().st_size > 10_000
    assert len(record["rows"]) == 2 * (len(prefix_reuse.ARMS) + 1)
    rows = {row["retention"]: row for row in record["rows"] if row["policy"] == "request FCFS"}
    assert rows["drop all"]["hit_rate"]["high"] == 0.0
    most = rows[prefix_reuse.BOUND]
    assert most["of_findable"]["low"] == 1.0
    for row in rows.values():
        assert row["hit_rate"]["estimate"] <= most["hit_rate"]["estimate"]
        assert (row["jobs"], row["requests"]) == (4, 16)
    assert printed.count("room for all |") == 2
