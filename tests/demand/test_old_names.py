"""Names of before still work for one release, and warn whoever uses them."""

import importlib

import pytest

import demand
from demand import (
    FCFS,
    SERPT,
    Distribution,
    Execution,
    Job,
    PDGraph,
    Unit,
    Workload,
    calibrate,
    compare,
    simulate,
)
from demand.integrations.job_ledger import JobLedger
from demand.integrations.transformers.jobs import JobTable
from demand.integrations.vllm.run import Run
from demand.simulation.engine import simulate_engine

KNOWN = Distribution([1.0, 2.0])
LATER = Distribution([7.0])
JOBS = Workload(
    [0.0, 1.0], [1.0, 2.0], ["a", "a"], {"a": KNOWN},
    runs=[[Execution(Unit("u", "tool"), seconds=s)] for s in (1.0, 2.0)],
)  # fmt: skip


@pytest.mark.parametrize(
    ("module", "old", "place"),
    [
        ("demand", "Quantum", "demand.TimeSlice"),
        ("demand.policies", "Quantum", "demand.policies.TimeSlice"),
        ("demand", "known_of", "demand.policies.known_of"),
        ("demand.refine", "Refine", "demand.refine.Estimator"),
        ("demand", "gittins_brute_force", "demand.distribution.rank.gittins_brute_force"),
    ],
)
def test_what_moved_is_found_where_it_was(module, old, place):
    where = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{module}.{old} is now {place}; the old name"):
        found = getattr(where, old)
    assert old not in where.__all__
    home, _, name = place.rpartition(".")
    assert found is getattr(importlib.import_module(home), name)


def test_a_name_that_never_was_is_none():
    with pytest.raises(AttributeError, match="module 'demand' has no attribute 'Quanta'"):
        demand.Quanta  # noqa: B018


def drawn(seed):
    runs = [[Execution(Unit("u", "tool"), seconds=s + seed)] for s in (1.0, 2.0)]
    return Workload([0.0, 1.0], [1.0 + seed, 2.0 + seed], ["a", "a"], {"a": KNOWN}, runs=runs)


@pytest.mark.parametrize(
    "ask",
    [
        lambda **told: simulate(JOBS, FCFS(), **told),
        lambda **told: simulate_engine(JOBS, FCFS(), **told),
        lambda **told: compare(drawn, [SERPT()], (0, 1), **told),
    ],
    ids=["simulate", "simulate_engine", "compare"],
)
def test_refine_is_now_estimator(ask):
    with pytest.warns(DeprecationWarning, match="refine= of .* is now estimator="):
        ask(refine=lambda application, progress: KNOWN)


def test_of_several_old_names_each_warning_is_of_the_line_that_gives_it():
    """Python shows a DeprecationWarning of a script's own lines, and hides those of libraries."""
    for ask, new in (
        (lambda: simulate_engine(JOBS, FCFS(), service_cost=demand.CostModel(1.0, 1.0)), "cost"),
        (lambda: simulate_engine(JOBS, FCFS(), refine=lambda *_: KNOWN), "estimator"),
        (
            lambda: calibrate(lambda _: KNOWN, JOBS.runs, (0,), demand="sum"),
            "parallel_calls",
        ),
    ):
        with pytest.warns(DeprecationWarning, match=f"is now {new}=") as seen:
            ask()
        assert [one.filename for one in seen] == [__file__]


def test_what_is_drawn_is_a_figure():
    graph = PDGraph.fit(JOBS.runs)
    report = calibrate(graph.remaining, JOBS.runs, (0,))
    for old, new in ((graph.draw, graph.figure), (report.draw, report.figure)):
        said = f"{type(old.__self__).__name__}.draw is now {type(old.__self__).__name__}.figure"
        with pytest.warns(DeprecationWarning, match=said):
            axes = old()
        assert axes.get_xlabel() == new().get_xlabel()
    with pytest.warns(DeprecationWarning, match="predict= of calibrate is now remaining="):
        again = calibrate(predict=graph.remaining, runs=JOBS.runs, after_units=(0,))
    assert again.overall.crps == report.overall.crps


def test_learn_is_now_expect():
    job = Job(0, "a", 0.0, KNOWN)
    with pytest.warns(DeprecationWarning, match="Job.learn is now Job.expect"):
        job.learn(LATER, None)
    assert job.distribution == LATER
    table = JobTable(FCFS(), {"a": KNOWN})
    opened = table.open("a")
    with pytest.warns(DeprecationWarning, match="JobTable.learn is now JobTable.expect"):
        table.learn(opened, LATER)
    assert opened.distribution == LATER
    ledger = JobLedger(FCFS(), {"a": KNOWN})
    run = Run(ledger.open("a", 0.0), ledger, lambda: 0.0, None)  # type: ignore[arg-type]
    with pytest.warns(DeprecationWarning, match="Run.learn is now Run.expect"):
        run.learn(LATER)
    assert run.job.distribution == LATER
