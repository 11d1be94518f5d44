"""The harnesses of routing.py and cluster.py in examples, on a few jobs."""

import json
import sys
from functools import partial
from pathlib import Path

from demand import hermes_applications

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(module, monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, "--out", str(folder), *arguments])
    module.main()


def test_routing_writes_a_row_for_each_mix_policy_and_router(
    record_sessions, monkeypatch, tmp_path, capsys
):
    monkeypatch.syspath_prepend(str(EXAMPLES / "experiments"))
    import routing

    monkeypatch.setattr(routing, "hermes_applications", partial(hermes_applications, 50))
    limits = ["--width", "3", "--token-budget", "500", "--blocks", "300", "--gaps", "3"]
    few = ["--seeds", "2", "--hermes-seeds", "2", "--jobs", "20", "--engines", "2"]
    run(routing, monkeypatch, tmp_path, "--data", str(record_sessions(16)), *limits, *few)
    record = json.loads((tmp_path / "routing.json").read_text())
    assert (tmp_path / "routing.png").stat().st_size > 10_000
    assert len(record["rows"]) == 2 * 2 * len(routing.ROUTERS)
    for row in record["rows"]:
        assert len(row["engines"]) == 2
        if row["mix"].startswith("Hermes"):
            assert row["hit_rate"]["high"] == 0.0
        elif row["router"] == "prefix affinity":
            assert row["of_findable"]["low"] == 1.0
            assert row["moved_share"]["high"] == 0.0
        if row["router"] == "random":
            assert row["mean_in_engines_over_random"]["estimate"] == 1.0
            assert row["moved_share"]["low"] > 0.0
    assert capsys.readouterr().out.count(", random |") == 4


def test_the_benchmark_writes_a_row_for_each_number_of_engines_and_router(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    import cluster

    monkeypatch.setattr(cluster, "hermes_applications", partial(hermes_applications, 50))
    few = ["--jobs", "10", "--engines", "2", "3", "--all-routers", "2", "--repeats", "1"]
    run(cluster, monkeypatch, tmp_path, *few)
    record = json.loads((tmp_path / "routing_speed.json").read_text())
    assert len(record["rows"]) == 2 * (2 + len(cluster.ROUTERS) + 1)
    for row in record["rows"]:
        assert row["events"] > row["decisions"] > 0
        if row["router"] == cluster.ONE:
            assert row["over_one_engine"] == 1.0
    alone = {row["router"]: row for row in record["rows"] if row["engines"] == 1}
    assert alone[cluster.ONE]["events"] == alone["least loaded"]["events"] > 0
