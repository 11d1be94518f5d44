"""Comparisons of policies: what they measure, whom they pair, what they refuse."""

import dataclasses
import json
import math
import re
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from demand import (
    EDF,
    FCFS,
    LAS,
    SERPT,
    VTC,
    Aging,
    ClosedLoop,
    DeadlineMix,
    DemandError,
    Distribution,
    Engine,
    Gittins,
    Oracle,
    Policy,
    RandomOrder,
    VirtualTime,
    Workload,
    bimodal_applications,
    closed_loop,
    compare,
    hermes_applications,
    poisson_workload,
    simulate,
    simulate_engine,
    with_deadlines,
)
from demand.simulation.engine import LRU, NextUse

module = import_module("demand.compare")  # the function of the same name hides it
BIMODAL = bimodal_applications(training_runs=40)
HERMES = hermes_applications(training_runs=20)
SEEDS = (3, 0, 5)
draw = partial(poisson_workload, BIMODAL, 0.8, 61)
quietly = partial(compare, progress=False)


def due(seed):
    return with_deadlines(draw(seed=seed), 2.0, share=0.5, seed=seed)


def test_numbers_are_those_of_simulate_by_hand():
    result = quietly(due, [Gittins(), RandomOrder()], SEEDS, servers=2, also=["p99_seconds"])
    assert list(result) == ["FCFS", "Gittins", "RandomOrder"]
    assert result.units == 3
    for name, policy in [("FCFS", FCFS()), ("Gittins", Gittins()), ("RandomOrder", RandomOrder())]:
        found = result.measured[name]
        for at, seed in enumerate(SEEDS):
            run = simulate(due(seed), policy, servers=2, seed=seed)
            first = simulate(due(seed), FCFS(), servers=2, seed=seed)
            times, work = run.completion_times, run.workload
            slow = [t / d for t, d in zip(times, work.demands, strict=True)]
            late = [
                arrival + t > deadline
                for arrival, t, deadline in zip(work.arrivals, times, work.deadlines, strict=True)
                if deadline < math.inf
            ]
            by_hand = {
                "mean_seconds": sum(times) / len(times),
                "p95_seconds": np.quantile(times, 0.95),
                "mean_to_fcfs": sum(times) / sum(first.completion_times),
                "p95_to_fcfs": run.quantile(0.95) / first.quantile(0.95),
                "mean_slowdown": sum(slow) / len(slow),
                "preemptions": run.preemptions,
                "deadline_misses": sum(late) / len(late),
                "p99_seconds": np.quantile(times, 0.99),
            }
            assert list(found) == list(by_hand)
            assert {m: v[at] for m, v in found.items()} == pytest.approx(by_hand, rel=1e-12)
    assert result["RandomOrder"]["mean_to_fcfs"].low < result["RandomOrder"]["mean_to_fcfs"].high


def test_on_an_engine_numbers_are_those_of_simulate_engine():
    engine = Engine(max_requests=4, blocks=400, preemption="recompute")
    work = partial(poisson_workload, HERMES, 3.0, 15)
    result = quietly(work, {"ours": Gittins()}, (0, 1), engine=engine, also=["prefilled_again"])
    assert list(result) == ["FCFS", "ours"]
    runs = [simulate_engine(work(seed=s), Gittins(), engine, seed=s) for s in (0, 1)]
    found = result.measured["ours"]
    assert found["mean_seconds"].tolist() == [run.mean for run in runs]
    assert found["prefilled_again"].tolist() == [run.prefilled_again for run in runs]
    assert sum(found["prefilled_again"]) > 0
    assert json.loads(result.to_json())["settings"]["engine"] == dataclasses.asdict(engine)


def test_what_a_call_tells_is_told_to_all_arms():
    class Says:
        def predict(self, call):
            return Distribution([1.0 + len(call.progress.executed), 9.0])

    work = partial(poisson_workload, HERMES, 0.9, 15)
    result = quietly(work, [SERPT()], (0, 1), predictor=Says())
    told = [simulate(work(seed=s), SERPT(), predictor=Says()).mean for s in (0, 1)]
    assert result.measured["SERPT"]["mean_seconds"].tolist() == told
    assert told != [simulate(work(seed=s), SERPT()).mean for s in (0, 1)]
    engine = Engine(max_requests=2)
    result = quietly(work, [SERPT()], (0, 1), predictor=Says(), engine=engine)
    told = [simulate_engine(work(seed=s), SERPT(), engine, predictor=Says()).mean for s in (0, 1)]
    assert result.measured["SERPT"]["mean_seconds"].tolist() == told
    assert told != [simulate_engine(work(seed=s), SERPT(), engine).mean for s in (0, 1)]


def test_what_progress_tells_is_told_to_all_arms():
    asked = []

    def refine(application, progress):
        asked.append(application)
        return Distribution([1.0, 9.0])

    work = partial(poisson_workload, HERMES, 0.9, 15)
    result = quietly(work, [SERPT()], (0, 1), estimator=refine)
    told = [simulate(work(seed=s), SERPT(), estimator=refine).mean for s in (0, 1)]
    assert asked
    assert result.measured["SERPT"]["mean_seconds"].tolist() == told
    assert told != [simulate(work(seed=s), SERPT()).mean for s in (0, 1)]


def test_all_arms_of_a_seed_serve_the_same_jobs(monkeypatch):
    drawn, served = [], []

    def drawing(*, seed):
        drawn.append(seed)
        return draw(seed=seed)

    def watched(workload, policy, servers, seed, *told):
        served.append((seed, workload))
        return simulate(workload, policy, servers, seed, *told)

    monkeypatch.setattr(module, "simulate", watched)
    quietly(drawing, [Gittins(), Oracle()], SEEDS)
    assert drawn == list(SEEDS)  # once a seed, and no more
    for seed in SEEDS:
        first, *others = [workload for at, workload in served if at == seed]
        assert len(others) == 2
        assert all(other is first for other in others)


def test_nobody_beats_the_oracle_on_one_server():
    policies = [LAS(5.0), SERPT(), Gittins(), RandomOrder(), Oracle()]
    result = quietly(draw, policies, range(4))
    least = result.measured["Oracle"]["mean_seconds"]
    for found in result.measured.values():
        assert (found["mean_seconds"] >= least * (1.0 - 1e-12)).all()
    assert result.loss("FCFS", "mean_seconds", of="Oracle").low > 0.0
    assert result["FCFS"]["mean_to_fcfs"] == (1.0, 1.0, 1.0)


def test_the_same_call_gives_the_same_numbers():
    """Also where a policy remembers: its counters and its clock begin anew for every run."""
    policies = [VTC(5.0), VirtualTime(), RandomOrder(), DeadlineMix(EDF(), Gittins())]
    once, again = (quietly(due, policies, SEEDS) for _ in range(2))
    assert once.to_json() == again.to_json()
    turned = quietly(due, policies[::-1], SEEDS[::-1])
    for arm, found in once.measured.items():
        for metric, numbers in found.items():
            assert turned.measured[arm][metric].tolist() == numbers[::-1].tolist()


def test_fcfs_comes_first_and_is_served_once(monkeypatch):
    served = []

    def watched(workload, policy, *rest):
        served.append(policy)
        return simulate(workload, policy, *rest)

    monkeypatch.setattr(module, "simulate", watched)
    assert list(quietly(draw, [Oracle(), FCFS(), Gittins()], (0, 1))) == [
        "FCFS",
        "Oracle",
        "Gittins",
    ]
    assert served.count(FCFS()) == 2
    assert list(quietly(draw, {"b": Oracle(), "as they come": FCFS()}, (0, 1))) == [
        "as they come",
        "b",
    ]
    assert served.count(FCFS()) == 4


def test_arms_are_named_by_what_is_not_the_default():
    class Own(Policy):
        def rank(self, job, now):
            return job.arrival

    policies = [Gittins(), Gittins("mean"), LAS(2), Aging(LAS(2), cap=9, rate=0.5), Own()]
    assert list(quietly(draw, policies, (0, 1)))[1:] == [
        "Gittins",
        "Gittins(variant='mean')",
        "LAS(quantum=2.0)",
        "Aging(LAS(quantum=2.0), cap=9.0, rate=0.5)",
        "Own",
    ]


def test_what_a_workload_does_not_have_is_left_out():
    def idle(seed):
        return Workload(
            [0.0, 1.0 + seed], [0.0, 0.0], ["a", "a"], {"a": Distribution([1.0])}, deadlines=None
        )

    found = quietly(draw, [Oracle()], (0, 1), also=["jain", "deadline_hits"])
    assert list(found["FCFS"]) == [*list(module.METRICS)[:-1], "jain"]
    with pytest.raises(DemandError, match="seeds 0 and 1 gave the same under every policy"):
        quietly(idle, [Oracle()], (0, 1))

    def partly(seed):
        return idle(seed) if seed else draw(seed=1)

    found = quietly(partly, [Oracle()], (0, 1))["FCFS"]
    assert str(found["mean_slowdown"]) == "-"  # one seed has none, so neither has the mean
    assert list(found) == list(module.METRICS)[:-1]


def test_closed_loops_are_compared_too():
    users = partial(closed_loop, BIMODAL, 5, 10.0, 40)
    result = quietly(users, [Gittins()], (0, 1))
    assert isinstance(users(seed=0), ClosedLoop)
    assert result.measured["Gittins"]["mean_seconds"][1] == simulate(users(seed=1), Gittins()).mean


def test_more_that_is_better_is_no_loss():
    result = quietly(due, [Oracle()], (0, 1, 2), also=["deadline_hits", "jain"])
    for metric in ("deadline_hits", "jain"):
        better = result.difference("Oracle", metric).estimate
        assert better > 0.0
        assert result.loss("Oracle", metric).estimate == -better
    hits = result.measured["Oracle"]["deadline_hits"]
    np.testing.assert_allclose(result.measured["Oracle"]["deadline_misses"], 1.0 - hits)


def test_every_figure_of_a_summary_can_be_had():
    work = poisson_workload(HERMES, 3.0, 5)
    known = set(module.METRICS) | set(module.FURTHER)
    assert set(simulate(work, FCFS()).summary()) <= known
    backends = {"backend_wait_seconds", "backend_idle_seconds"}  # compare has none
    figures = set(simulate_engine(work, FCFS()).summary())
    assert figures - backends <= known | set(module.FURTHER_OF_ENGINE)
    assert set(module.HIGHER_IS_BETTER) <= known


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(policies=[]), "policies is empty; expected at least one"),
        (dict(policies={}), "policies is empty; expected at least one"),
        (dict(policies=Gittins()), "expected a list of policies, such as"),
        (dict(policies=[Gittins]), r"policies\[0\] is the class Gittins"),
        (dict(policies=[FCFS(), "FCFS"]), r"policies\[1\] is 'FCFS'; expected a policy"),
        (dict(policies={"a": None}), "policy 'a' is None; expected a policy"),
        (dict(policies={1: Gittins()}), "an arm is named 1; expected text"),
        (dict(policies=[LAS(2), LAS(2.0)]), r"two arms are named 'LAS\(quantum=2.0\)'"),
        (dict(policies={"FCFS": Gittins()}), r"the arm 'FCFS' is Gittins\(.*another name"),
        (dict(seeds=[]), r"seeds are \[\]; expected at least two"),
        (dict(seeds=[7]), r"seeds are \[7\]; expected at least two.*no width.*summary\(\)"),
        (dict(seeds=8), r"seeds is 8; expected whole numbers, such as range\(8\)"),
        (dict(seeds="01"), "seeds is '01'; expected whole numbers"),
        (dict(seeds=[0, 1, 0]), "seed 0 is given twice"),
        (dict(seeds=[0, 1.5]), r"seeds\[1\] is 1.5; expected a whole number of at least 0"),
        (dict(seeds=[0, -1]), r"seeds\[1\] is -1"),
        (dict(seed=-1), "seed is -1"),
        (dict(servers=0), "servers is 0; expected a whole number of at least 1"),
        (dict(servers=2, engine=Engine()), "servers is 2 and an engine is given"),
        (dict(engine=Engine), "engine is the class Engine"),
        (dict(also=["p98_seconds"]), "also has 'p98_seconds', which is not to be had; expected of"),
        (dict(also=["mean_batch"]), "also has 'mean_batch', which is not to be had without an eng"),
        (dict(also="jain"), "also is 'jain'; expected a list of"),
        (dict(workload=draw(seed=0)), "workload is one Workload, and seeds would change nothing"),
        (dict(workload=Workload), "workload is the class Workload; expected a function of seed"),
        (dict(workload=8), "workload is 8; expected a function of seed"),
        (dict(workload=lambda load: draw()), r"cannot be called as workload\(seed=0\) \(.*load"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_anything_runs(monkeypatch, given, message):
    monkeypatch.setattr(module, "simulate", None)  # nothing may run
    monkeypatch.setattr(module, "simulate_engine", None)
    arguments = dict(workload=draw, policies=[Gittins()], seeds=(0, 1)) | given
    with pytest.raises(DemandError, match=message):
        quietly(**arguments)


def test_seeds_that_change_nothing_are_refused():
    with pytest.raises(DemandError, match=r"seeds 0 and 1 gave the same.*pass its seed= on"):
        quietly(lambda seed: draw(seed=9), [Gittins()], range(5))
    with pytest.raises(DemandError, match="workload is None; expected a Workload"):
        quietly(lambda seed: None, [Gittins()], range(5))


def test_a_bar_shows_every_run_where_tqdm_is(monkeypatch, capsys):
    compare(draw, [Gittins()], SEEDS)
    assert "6/6" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # not installed
    assert compare(draw, [Gittins()], SEEDS).units == 3
    assert capsys.readouterr().err == ""


def test_the_record_says_what_was_compared():
    settings = json.loads(quietly(draw, [LAS(2)], np.arange(2), seed=4).to_json())["settings"]
    assert settings["workload"] == repr(draw(seed=0))
    assert settings["policies"] == {"FCFS": "FCFS()", "LAS(quantum=2.0)": "LAS(quantum=2.0)"}
    assert (settings["seeds"], settings["servers"], settings["engine"]) == ([0, 1], 1, None)
    assert settings["seed"] == 4


def test_the_example_of_the_page_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "demand.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0].replace("2000", "50"), {})
    printed = capsys.readouterr().out
    assert "4 seeds, 95 % intervals of the mean" in printed
    assert (tmp_path / "compared.json").exists()


def test_the_settings_say_which_rule_of_retention_it_was():
    for rule in (LRU(), NextUse(30.0)):
        work = partial(poisson_workload, HERMES, 3.0, 4)
        result = quietly(work, [LAS(2)], range(2), engine=Engine(retention=rule))
        said = json.loads(result.to_json())["settings"]["engine"]["retention"]
        assert said == repr(rule)
