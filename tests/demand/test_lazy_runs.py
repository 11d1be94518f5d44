"""Runs kept as columns or as picks are the runs that they stand for, and are drawn by the law of
those that are drawn one by one."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demand import (
    SERPT,
    Application,
    CostModel,
    DemandError,
    DemandEstimator,
    Distribution,
    Execution,
    RequestFCFS,
    Unit,
    WholeRuns,
    hermes_applications,
    poisson_workload,
    recorded_applications,
    simulate,
)
from demand.flow import visits, visits_together
from demand.lazy_runs import (
    KEPT,
    ColumnRuns,
    MixedRuns,
    PickedRuns,
    execution_seconds,
    runs_seconds,
)
from demand.traces import ApplicationProfile, StageProfile
from demand.workloads import closed_loop
from demand.workloads.hermes import hermes_generator
from demand.workloads.profiled import draw_runs, profiled_applications
from demand.workloads.runs import RunGenerator, Stage

LLM, TOOL = Unit("llm", "llm"), Unit("tool", "tool")
tokens = st.floats(0.5, 1e5)
executions = st.one_of(
    st.builds(Execution, st.just(LLM), tokens, tokens, st.integers(1, 50)),
    st.builds(Execution, st.just(TOOL), tokens, tokens, st.integers(1, 50), st.floats(0.0, 1e4)),
)
run_lists = st.lists(st.lists(executions, min_size=1, max_size=20), min_size=1, max_size=6)
COST = CostModel(0.00037, 0.0411)


def columns(runs):
    flat = [execution for run in runs for execution in run]
    return ColumnRuns(
        (LLM, TOOL),
        np.array([(LLM, TOOL).index(e.unit) for e in flat]),
        np.cumsum([0, *map(len, runs)]),
        np.array([e.input_tokens for e in flat]),
        np.array([e.output_tokens for e in flat]),
        np.array([e.parallelism for e in flat]),
        np.array([np.nan if e.seconds is None else e.seconds for e in flat]),
    )


@given(run_lists, st.data())
def test_lazy_runs_are_the_runs(runs, data):
    lazy = columns(runs)
    picks = data.draw(st.lists(st.integers(0, len(runs) - 1), min_size=1))
    picked = PickedRuns(lazy, np.array(picks))
    source = np.array(data.draw(st.permutations([0] * len(runs) + [1] * len(picks))))
    mixed = MixedRuns.of([runs, picked], source)
    ones, twos = iter(runs), iter([runs[at] for at in picks])
    expected = [next(twos) if at else next(ones) for at in source]
    for one, other in (
        (lazy, runs), (picked, [runs[at] for at in picks]), (mixed, expected),
    ):  # fmt: skip
        assert list(one) == other
        assert one == other
        assert other == one
        assert one[-1] == other[-1]
        assert one[1:3] == other[1:3]
        assert one != [*other, other[0]]
        assert one.seconds(COST).tolist() == [COST.run_seconds(run) for run in other]
        for at, run in enumerate(other):
            expected_seconds = [COST.seconds(execution) for execution in run]
            assert one.execution_seconds(at, COST) == expected_seconds
            assert execution_seconds(other, at, COST) == expected_seconds
        assert runs_seconds(other, COST).tolist() == runs_seconds(one, COST).tolist()
        with pytest.raises(IndexError):
            one[len(other)]
    assert str(len(runs)) in repr(lazy)


@given(st.lists(st.integers(0, 6), min_size=7, max_size=7), st.lists(st.integers(0, 6), max_size=9))
def test_many_take_the_way_that_each_takes(steps, first):
    """A step of at least 1 upwards from each number, until 7 or above is the end."""
    after = [min(at + 1 + step, 7) for at, step in enumerate(steps)]
    unit, starts = visits_together(
        np.array(first, dtype=np.int64), lambda _, at: np.array(after)[at], 7
    )
    ways = [list(visits(begin, after.__getitem__, 7)) for begin in first]
    together = [unit[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert together == ways


def assert_alike(some, many, error=4.5):
    """Means within `error` standard errors, of seconds, of lengths and of the units' attributes."""
    for measure in (
        COST.run_seconds,
        len,
        lambda run: max(e.parallelism for e in run),
        lambda run: sum(e.input_tokens for e in run),
        lambda run: sum(e.unit.kind == "llm" for e in run),
        lambda run: COST.seconds(run[-1]),
    ):
        a, b = np.array([measure(r) for r in some]), np.array([measure(r) for r in many])
        spread = np.sqrt(a.var() / a.size + b.var() / b.size)
        assert abs(a.mean() - b.mean()) <= error * spread + 1e-9
        assert a.std() == pytest.approx(b.std(), rel=0.35, abs=1e-9)
    kinds = [{(e.unit, e.seconds is None) for run in runs for e in run} for runs in (some, many)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", ["code_feedback", "factool_kbqa", "langchain_mapreduce"])
def test_runs_drawn_together_have_the_law_of_those_drawn_one_by_one(name):
    generator = hermes_generator(name)
    rng = np.random.default_rng(0)
    assert_alike([generator.run(rng) for _ in range(1000)], generator.runs(rng, 3000)[:])


def test_without_chance_they_are_the_same():
    stages = {
        "a": Stage("llm", {"b": 1.0}, (100.0, 7.0), 3.0),
        "b": Stage("tool", {"c": 1.0}, seconds=2.5),
        "c": Stage("llm", {"end": 1.0}, (30.0, 2.0)),
    }
    generator = RunGenerator(stages, spread=0.0, call_spread=0.0)
    rng = np.random.default_rng(0)
    assert generator.runs(rng, 4) == [generator.run(rng)] * 4
    assert generator.runs(rng, 0) == []


TURNS = StageProfile(
    "llm", (10.0, 30.0), (5.0, 6.0, 9.0), (), (1.0, 4.0), ("shell", "end"), (0.3, 0.7),
    (1.0, 2.0, 5.0), (0.5, 8.0),
)  # fmt: skip
SHELL = StageProfile("container", (), (), (3.0, 9.0), (2.0,), ("turns", "end", "turns"))


def test_profiles_drawn_together_have_the_law_of_sessions():
    profile = ApplicationProfile("a", ("turns", "shell"), {"turns": TURNS, "shell": SHELL})
    rng = np.random.default_rng(1)
    together = draw_runs(profile, rng, 4000)
    assert_alike([profile.session(rng).run() for _ in range(1500)], together[:])
    for run in together[:200]:
        assert run[0].unit.name != "before turns"
        for before, after in itertools.pairwise(run):
            assert (after.unit.name == "turns") == (before.unit.name == "before turns")
    assert draw_runs(profile, rng, 0) == []


def test_a_profile_without_chance_is_the_same():
    one = StageProfile("llm", (10.0,), (5.0,), (), (3.0,), ("two",), (), (2.0,), (0.5,))
    two = StageProfile("search", (4.0,), (), (1.5,), (), ("end",), gap_seconds=(7.0,))
    profile = ApplicationProfile("a", ("one",), {"one": one, "two": two})
    rng = np.random.default_rng(0)
    run = profile.session(rng).run()
    assert [e.unit.name for e in run] == ["one", "before one", "one", "before two", "two"]
    assert draw_runs(profile, rng, 3) == [run] * 3


def test_drawing_and_serving_makes_no_executions(monkeypatch):
    """What a job executes is made when it is asked for, and lost again."""
    profile = ApplicationProfile("profiled", ("turns",), {"turns": TURNS, "shell": SHELL})
    recorded = {"recorded": hermes_generator("react_fever").runs(np.random.default_rng(0), 20)[:]}
    applications = (
        *hermes_applications(training_runs=20),
        *profiled_applications([profile], training_runs=20),
        *recorded_applications(recorded),
    )
    made = []
    check = Execution.__post_init__
    monkeypatch.setattr(Execution, "__post_init__", lambda self: made.append(check(self)))
    workload = poisson_workload(applications, 0.8, 500)
    simulate(workload, SERPT())
    simulate(workload, RequestFCFS())  # ends of units without the units
    closed_loop(applications, users=4, think_seconds=1.0, jobs=100)
    assert not made
    assert workload.demands.tolist() == [CostModel().run_seconds(run) for run in workload.runs]
    assert made


def test_as_many_runs_stay_made_as_are_often_served_again():
    runs = hermes_generator("react_fever").runs(np.random.default_rng(0), KEPT + 3)
    made = list(runs)
    assert sum(a is b for a, b in zip(made, runs, strict=True)) == KEPT
    assert made == runs


def test_results_are_those_of_lists():
    applications = hermes_applications(training_runs=50)
    lazy = poisson_workload(applications, 0.8, 60, seed=2)
    lists = type(lazy)(
        lazy.arrivals, lazy.demands, lazy.applications, lazy.distributions, lazy.load,
        runs=list(lazy.runs), graphs=lazy.graphs,
    )  # fmt: skip
    estimator = DemandEstimator(lazy.graphs, WholeRuns())
    times = [simulate(w, SERPT(), estimator=estimator).completion_times for w in (lazy, lists)]
    np.testing.assert_array_equal(*times)


def test_a_sampler_that_draws_too_few_is_refused():
    unit = Execution(TOOL, seconds=1.0)
    known = Distribution([1.0])
    for samplers in ({"sample_runs": lambda rng, n: [[unit]]}, {"sample": lambda rng, n: [1.0]}):
        application = Application("short", known, mean_seconds=1.0, **samplers)
        with pytest.raises(DemandError, match=r"'short' drew shape \(1,\) when asked for 5 jobs"):
            poisson_workload([application], 0.5, 5)
