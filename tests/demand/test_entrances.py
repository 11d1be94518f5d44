"""What callers hand in is what was meant, or refused by its name."""

import datetime as dt

import numpy as np
import pytest

from demand import (
    FCFS,
    Application,
    CostModel,
    CurrentUnit,
    DemandError,
    DemandEstimator,
    Distribution,
    Execution,
    GivenUnit,
    Job,
    JobMaker,
    NearestRuns,
    NoRefinement,
    PDGraph,
    PearsonFilter,
    Progress,
    ProgressRegression,
    PromptRegression,
    RankTable,
    Unit,
    WholeRuns,
    Workload,
    bimodal_applications,
    calibrate,
    closed_loop,
    drift,
    hermes_applications,
    poisson_workload,
    rank_many,
    recorded_applications,
    with_arrivals,
    with_deadlines,
)
from demand.policies import known_of
from demand.refine import LogRidge
from demand.refine.calibration import crps
from demand.traces import Span, read_opentelemetry

LLM, TOOL = Unit("plan", "llm"), Unit("search", "tool")
RUN = [Execution(LLM, 10, 5), Execution(TOOL, seconds=2.0)]
GRAPH = PDGraph.fit([RUN, RUN])
LONG = PDGraph.fit([[Execution(TOOL, seconds=1.0 + at)] * 3 for at in range(40)])
KNOWN = {"a": Distribution([1.0, 2.0])}
JOBS = Workload([0.0, 1.0], [1.0, 2.0], ["a", "a"], KNOWN)
MOMENTS = np.array(["2026-01-01T00:00", "2026-01-01T00:01"], "datetime64[s]")
MASKED = np.ma.MaskedArray([1.0, 2.0], [False, True])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PDGraph.fit(RUN), "run is a single execution, of .*plan.*; expected a list of"),
        (lambda: PDGraph.fit([["plan"]]), r"run\[0\] is 'plan'; expected an Execution"),
        (lambda: PDGraph.fit(["plan"]), r"run is 'plan'; expected a list of Execution"),
        (lambda: PDGraph().observe(RUN[0]), "run is a single execution"),
        (lambda: PDGraph().observe(3), r"run is 3"),
        (lambda: PDGraph().observe([]), "the run is empty"),
        (lambda: PDGraph(cost=2.0), r"cost is 2.0; expected a CostModel"),
        (lambda: GRAPH.remaining(RUN), "progress is .* expected a Progress"),
        (lambda: PDGraph.from_units([TOOL], {}), r"units\[0\] is .*Unit.*; expected a GivenUnit"),
        (lambda: GivenUnit("search", [RUN[1]], {"end": 1.0}), r"unit is 'search'"),
        (lambda: GivenUnit(TOOL, RUN[1], {"end": 1.0}), "executions is a single execution"),
        (lambda: Execution("plan", 1, 2), r"unit of an execution is 'plan'"),
        (lambda: Execution(Unit, 1, 2), "is the class Unit; expected a Unit"),
        (lambda: Execution(LLM, None, 5), "input_tokens of unit 'plan' is None"),
        (lambda: Execution(LLM, 5, None), "output_tokens of unit 'plan' is None"),
        (lambda: Execution(LLM, "5", 1), "input_tokens of unit 'plan' holds text"),
        (lambda: Execution(LLM, dt.timedelta(1), 1), "input_tokens .* expected plain numbers"),
        (lambda: Execution(TOOL, seconds="2"), "seconds of unit 'search' holds text"),
        (lambda: Execution(TOOL, seconds=2.0, parallelism=1.5), "parallelism of unit 'search'"),
        (lambda: Execution.of_calls("x", seconds=[1.0]), "unit of an execution is 'x'"),
        (lambda: Execution.of_calls(TOOL, seconds=["1"]), "seconds of the calls .* holds text"),
        (lambda: Unit(3, "tool"), "unit name is 3; expected a string"),
        (lambda: Unit("a", ["tool"]), r"kind \['tool'\]"),
        (lambda: Progress(RUN[0]), "executed is a single execution"),
        (lambda: Progress((), "a", attained_seconds="3"), "attained_seconds holds text"),
        (lambda: DemandEstimator({"a": [RUN]}), "graph of 'a' is .* expected a PDGraph"),
        (
            lambda: DemandEstimator({"a": GRAPH}, WholeRuns),
            r"refinement is the class WholeRuns; expected a Refinement; make one: WholeRuns\(",
        ),
        (lambda: DemandEstimator({"a": GRAPH})("a", RUN), "progress is .* expected a Progress"),
        (lambda: calibrate(lambda p: KNOWN["a"], RUN), r"runs\[0\] is a single execution"),
        *(
            (lambda refinement=refinement: refinement.fit([RUN]), "graph is .* expected a PDGraph")
            for refinement in (
                *(CurrentUnit(), NearestRuns(), NoRefinement(), WholeRuns()),
                *(PearsonFilter(), ProgressRegression()),
            )
        ),
        (lambda: WholeRuns().remaining(GRAPH, RUN), "progress is .* expected a Progress"),
        *(
            (lambda r=r: r.fit(GRAPH).remaining(RUN), "progress is .* expected a Progress")
            for r in (CurrentUnit(), NoRefinement(), WholeRuns(), PearsonFilter())
        ),
        *(
            (lambda r=r: r.fit(LONG).remaining(RUN), "progress is .* expected a Progress")
            for r in (NearestRuns(), ProgressRegression())
        ),
        (lambda: PDGraph.fit(RUN[0]), "runs is Execution.*; expected a list of runs"),
        (lambda: PDGraph.fit(None), "runs is None; expected a list of runs"),
        (lambda: PDGraph(5), "name is 5; expected a str"),
        (lambda: PDGraph(half_life_runs="3"), "half_life_runs holds text"),
        (lambda: Progress((), TOOL), "current is Unit.*expected the name of a unit"),
        (lambda: CostModel().run_seconds(RUN[0]), "run is a single execution"),
        (lambda: CostModel().seconds(RUN), "execution is .*expected an Execution"),
        (lambda: PearsonFilter("x"), "threshold holds text"),
        (
            lambda: GivenUnit(TOOL, RUN[1:], ["end"]),
            r"successors of .*expected a mapping",
        ),
        (lambda: GivenUnit(TOOL, RUN[1:], {"end": "1"}), "the probability of 'end' holds text"),
        (
            lambda: PDGraph.from_units([GivenUnit(TOOL, RUN[1:], {"end": 1.0})], ["search"]),
            r"entries is \['search'\]; expected a mapping",
        ),
        (lambda: DemandEstimator(GRAPH), "graphs is PDGraph.*expected a mapping"),
        (lambda: calibrate(PDGraph, [RUN]), "remaining is the class PDGraph; expected a function"),
        (
            lambda: calibrate(lambda p: 5.0, [RUN]),
            "what remaining says is 5.0; expected a Distribut",
        ),
        (lambda: calibrate(lambda p: KNOWN["a"], None), "runs is None; expected a list of runs"),
        (lambda: known_of("a", {"a": 1.0}), "distribution of 'a' is 1.0"),
        (lambda: known_of("a", None), "distributions is None; expected a mapping"),
        (lambda: Job(0, "a", 0.0, [1.0]), r"distribution of job 0 is \[1.0\]"),
        (lambda: Job(0, "a", "0", KNOWN["a"]), "arrival of job 0 holds text"),
        (lambda: Job(0, "a", 0.0, KNOWN["a"], deadline=None), "deadline of job 0 is None"),
        (lambda: Job(0, "a", 0.0, KNOWN["a"], weight=[1.0]), "weight of job 0 has shape"),
        (lambda: JobMaker(Workload, FCFS(), Job), "workload is the class Workload"),
        (lambda: JobMaker(JOBS, FCFS, Job), "policy is the class FCFS"),
        (lambda: RankTable(KNOWN["a"]).at("1"), "age holds text"),
        (lambda: RankTable(KNOWN["a"]).at(MOMENTS), "age holds moments"),
        (lambda: RankTable(KNOWN["a"]).at([0.5, 1.0]), "age has shape"),
        (lambda: RankTable(KNOWN["a"]).next_above("1", 1.0), "age holds text"),
        (lambda: RankTable(KNOWN["a"]).next_above(0.5, None), "threshold is None"),
        (lambda: RankTable(KNOWN["a"]).next_above(0.5, float("nan")), "threshold is NaN"),
        (lambda: recorded_applications([RUN, RUN]), "runs is .*expected a mapping"),
        (lambda: recorded_applications({"a": None}), r"runs\['a'\] is None; expected a list"),
        (
            lambda: recorded_applications({"a": [RUN, RUN]}, training_share="0.5"),
            "training_share holds text",
        ),
        (lambda: Application("a", KNOWN["a"], weight="1"), "weight of application 'a' holds text"),
        (lambda: Application("a", KNOWN["a"], graph=PDGraph), "graph of 'a' is the class PDGraph"),
        (lambda: Application("a", KNOWN["a"], 5.0, 1.0), "sample of 'a' is 5.0"),
        (lambda: Application(5, KNOWN["a"]), "name of an application is 5"),
        (lambda: Workload([0], [1], 5, KNOWN), "applications is 5; expected a list"),
        (lambda: Workload([0], [1], ["a"], KNOWN, tenants=5), "tenants is 5; expected a list"),
        (
            lambda: Workload([0], [1], ["a"], KNOWN, priorities=[np.timedelta64(1, "s")]),
            "priorities have .*expected numbers",
        ),
        (lambda: Workload([0], [1], ["a"], None), "distributions is None; expected a mapping"),
        (lambda: Workload([0], [1], ["a"], KNOWN, runs="x"), "runs is 'x'; expected a list"),
        (lambda: Workload([0], [1], ["a"], KNOWN, graphs={"a": PDGraph}), "graph of 'a' is the cl"),
        (lambda: Workload([0], [1], ["a"], KNOWN, weights={"a": "1"}), "weight of .* holds text"),
        (lambda: Span("a", "tool", seconds="1"), "seconds of span 'a' holds text"),
        (lambda: Span("a", "llm", input_tokens=None), "input_tokens of span 'a' is None"),
        (lambda: drift([RUN, RUN], 1), "graph is .* expected a PDGraph"),
        (lambda: RankTable([1.0, 2.0]), "distribution is .* expected a Distribution"),
        (lambda: RankTable(KNOWN["a"], variant=["mean"]), r"variant is \['mean'\]"),
        (lambda: rank_many([KNOWN["a"]], [0], [1.0]), r"tables\[0\] is .* expected a RankTable"),
        (lambda: Distribution.mixture([[1.0]]), r"distributions\[0\] is \[1.0\]"),
        (lambda: KNOWN["a"].convolve(3.0), "other is 3.0"),
        (lambda: poisson_workload(bimodal_applications, 0.5, 2), "applications is <function"),
        (lambda: poisson_workload([Application], 0.5, 2), r"applications\[0\] is the class"),
        (lambda: Application("a", [1.0]), r"distribution of 'a' is \[1.0\]"),
        (lambda: Workload([0], [1], ["a"], {"a": 3.0}), "distribution of 'a' is 3.0"),
        (lambda: recorded_applications({"a": RUN}), r"runs\['a'\]\[0\] is a single execution"),
        (lambda: with_arrivals([1.0], [0.0, 1.0]), "workload is .* expected a Workload"),
        (lambda: with_deadlines(bimodal_applications(2), 1.5), "workload is .* expected a Workl"),
    ],
)
def test_a_wrong_object_is_named_with_what_was_expected(make, says):
    with pytest.raises(DemandError, match=says):
        make()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Distribution(MOMENTS), "values holds moments"),
        (lambda: Distribution(MASKED), "values has 1 masked entries"),
        (lambda: Distribution(["1", "2"]), "values holds text"),
        (lambda: Distribution([True, False]), "values holds truth values"),
        (lambda: Distribution([1.0, 2.0], ["1", "1"]), "weights holds text"),
        (lambda: Distribution([1.0, 2.0], MASKED), "weights has 1 masked entries"),
        (lambda: Distribution([1.0, 2.0], np.array([1, 2], "timedelta64[s]")), "plain numbers"),
        (lambda: KNOWN["a"].quantile("0.5"), "q holds text"),
        (lambda: KNOWN["a"].scale(dt.timedelta(1)), "factor is .* expected plain numbers"),
        (lambda: RankTable(KNOWN["a"])(MASKED), "ages has 1 masked entries"),
        (lambda: rank_many([RankTable(KNOWN["a"])], [0, 0], ["1", "2"]), "ages holds text"),
        (lambda: with_arrivals(JOBS, MOMENTS), r"times holds moments .* times - times\[0\]"),
        (lambda: Workload(MOMENTS, [1, 1], ["a", "a"], KNOWN), "arrivals holds moments"),
        (lambda: Workload([0, 1], MASKED, ["a", "a"], KNOWN), "demands has 1 masked"),
        (
            lambda: Workload([0, 1], [1, 1], ["a", "a"], KNOWN, deadlines=["2", "3"]),
            "deadlines holds text",
        ),
        (lambda: crps(KNOWN["a"], "1"), "observed holds text"),
    ],
)
def test_what_numpy_would_misread_as_seconds_is_refused(make, says):
    with pytest.raises(DemandError, match=says):
        make()


def test_durations_are_seconds_wherever_seconds_come_in():
    minutes = np.array([1, 2], "timedelta64[m]")
    assert Distribution(minutes) == Distribution([60.0, 120.0])
    assert Distribution([dt.timedelta(minutes=1), dt.timedelta(minutes=2)]).values[1] == 120.0
    known = Distribution([60.0, 180.0])
    assert known.mean(dt.timedelta(minutes=1)) == known.mean(60.0) == 120.0
    assert known.shift(np.timedelta64(1, "m")) == known.shift(60.0)
    assert RankTable(known)(minutes).tolist() == RankTable(known)([60.0, 120.0]).tolist()
    jobs = Workload(minutes, minutes, ["a", "a"], KNOWN)
    assert jobs.arrivals.tolist() == jobs.demands.tolist() == [60.0, 120.0]
    assert with_arrivals(jobs, MOMENTS - MOMENTS[0], "resampled").arrivals[-1] == 120.0
    assert Execution(TOOL, seconds=dt.timedelta(minutes=1)).seconds == 60.0
    assert Execution.of_calls(TOOL, seconds=minutes).longest_seconds == 120.0
    assert Progress((), "search", attained_seconds=minutes[0]).attained_seconds == 60.0


WHOLE = {
    "walks": lambda n: GRAPH.remaining(walks=n, seed=n, max_units=n),
    "draw_runs": lambda n: GRAPH.draw_runs(n, seed=n, max_units=n),
    "window": lambda n: PDGraph(window=n).window,
    "recent": lambda n: drift(PDGraph.fit([RUN] * 9), recent=n).recent,
    "after_units": lambda n: calibrate(lambda p: KNOWN["a"], [RUN * 9], [n], seed=n).overall.pits,
    "atoms": lambda n: Distribution([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).compress(n),
    "parallelism": lambda n: Execution(TOOL, seconds=1.0, parallelism=n).parallelism,
    "refinements": lambda n: [
        *(NearestRuns(n), CurrentUnit(n, n), NoRefinement(n, n)),
        *(PearsonFilter(0.5, n, n, n, n), ProgressRegression(1.0, n, n, n)),
        *(PromptRegression(1.0, n, n, n), LogRidge(1.0, n, n, n)),
    ],
    "jobs": lambda n: poisson_workload(bimodal_applications(n, n), 0.5, n, n, n).demands,
    "closed_loop": lambda n: closed_loop(bimodal_applications(9), n, 1.0, n, n).think_seconds,
    "hermes": lambda n: len(hermes_applications(n, n)),
    "wait_lines": lambda n: repr(read_opentelemetry("t.jsonl", wait_lines=n)),
}


@pytest.mark.parametrize("ask", WHOLE.values(), ids=WHOLE)
def test_whole_numbers_of_any_kind_are_taken(ask):
    told = [repr(ask(number)) for number in (4, 4.0, np.int64(4), np.array(4))]
    assert len(set(told)) == 1


@pytest.mark.parametrize("ask", WHOLE.values(), ids=WHOLE)
def test_what_is_no_whole_number_is_refused(ask):
    for number in (4.5, "4", True, None):
        with pytest.raises(DemandError, match="expected a whole number"):
            ask(number)
