"""Runs whose units go side by side: what they say, demand in two senses, stages, graphs, files."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import (
    CostModel,
    CurrentUnit,
    DemandError,
    DemandEstimator,
    Distribution,
    Execution,
    Gittins,
    NearestRuns,
    NoRefinement,
    PDGraph,
    PearsonFilter,
    PendingCall,
    Pool,
    Progress,
    ProgressRegression,
    PromptRegression,
    Unit,
    WholeRuns,
    Workload,
    calibrate,
    simulate,
)
from demand.dependencies import stage_numbers
from demand.graph.given_units import GivenUnit
from demand.prewarm.successors import successors_of
from demand.stages import (
    Underway,
    in_stages,
    progress_after,
    progress_in_stages,
    seconds_after,
)
from tests.demand.plans import executions, longest_chain, plans, told, waiting

WHOLE = CostModel(0.25, 1.0)
PLAN, JOIN, LAST = (Unit(name, "llm") for name in ("plan", "join", "last"))
SEARCH, MATH = Unit("search", "search"), Unit("math", "tool")


def fan(first=2.0, second=5.0, third=3.0):
    """A plan, two searches and a calculation side by side, and what joins them."""
    return [
        Execution(PLAN, 4, 1),
        Execution(SEARCH, seconds=first, after=(0,)),
        Execution(SEARCH, seconds=second, after=(0,)),
        Execution(MATH, seconds=third, after=(0,)),
        Execution(JOIN, 8, 2, after=(1, 2, 3)),
    ]


@pytest.mark.parametrize(
    ("afters", "says"),
    [
        ([None, (1,)], "unit 1 of the run waits for unit 1, which is itself"),
        (
            [(1,), (0,)],
            "unit 0 of the run waits for unit 1, not before it; expected .. or None",
        ),
        ([None, (7,)], "unit 1 of the run waits for unit 7, there is none"),
    ],
)
def test_units_wait_for_what_is_before_them(afters, says):
    run = waiting([Execution(MATH, seconds=1.0)] * 2, afters)
    for refused in (
        lambda: PDGraph.fit([run]),
        lambda: CostModel().run_seconds(run, "critical_path"),
        lambda: in_stages(run),
    ):
        with pytest.raises(DemandError, match=says):
            refused()


@pytest.mark.parametrize("after", [-1, 2, "0", (-1,), (0.5,), (True,), [None]])
def test_positions_are_whole_numbers(after):
    with pytest.raises(DemandError, match="after of unit 'math'"):
        Execution(MATH, seconds=1.0, after=after)
    with pytest.raises(DemandError, match="after of unit 'math'"):
        Underway(MATH, after)


def test_positions_come_in_order_and_once():
    assert Execution(MATH, seconds=1.0, after=[np.int64(2), 0, 2]).after == (0, 2)


def test_demand_in_two_senses():
    run = fan()
    assert WHOLE.run_seconds(run) == 2.0 + 2.0 + 5.0 + 3.0 + 4.0
    assert WHOLE.run_seconds(run, "critical_path") == 2.0 + 5.0 + 4.0


@settings(max_examples=200)
@given(plans())
def test_the_sum_and_the_critical_path_are_those_of_brute_force(run):
    total = sum(WHOLE.seconds(execution) for execution in run)
    critical = longest_chain(run, WHOLE)
    assert WHOLE.run_seconds(run) == total
    assert WHOLE.run_seconds(run, "critical_path") == critical
    longest = max(WHOLE.seconds(execution, "critical_path") for execution in run)
    assert longest <= critical <= total


@given(st.lists(executions(), min_size=1, max_size=6))
def test_a_chain_that_is_told_is_the_sequence(run):
    chain = told(run)
    assert list(in_stages(chain)) == run
    assert in_stages(tuple(run)) == tuple(run)
    for count in ("sum", "critical_path"):
        assert WHOLE.run_seconds(chain, count) == WHOLE.run_seconds(run, count)
        for refinement in (CurrentUnit(), WholeRuns()):
            graphs = [PDGraph.fit([one], cost=WHOLE) for one in (run, chain)]
            assert refinement.remaining(graphs[0], None, count) == refinement.remaining(
                graphs[1], None, count
            )
    for finished in range(len(run) + 1):
        assert progress_after(chain, finished, WHOLE) == Progress(run[:finished])


@settings(max_examples=200)
@given(plans())
def test_stages_keep_the_sum_and_never_shorten_the_critical_path(run):
    staged = in_stages(run, WHOLE)
    assert WHOLE.run_seconds(staged) == pytest.approx(WHOLE.run_seconds(run))
    assert WHOLE.run_seconds(staged, "critical_path") >= longest_chain(run, WHOLE) - 1e-9
    assert sum(e.parallelism for e in staged) == sum(e.parallelism for e in run)


def test_a_stage_is_its_units_with_all_their_calls():
    plan, middle, join = in_stages(fan(), WHOLE)
    assert (plan, join.unit, join.after) == (fan()[0], JOIN, None)
    assert middle.unit == Unit("math + search", "tool")
    assert middle.parallelism == 3
    assert WHOLE.seconds(middle) == 10.0
    assert WHOLE.seconds(middle, "critical_path") == 5.0
    searches = in_stages(fan()[:3], WHOLE)[1]
    assert searches == Execution.of_calls(SEARCH, seconds=[2.0, 5.0])


@settings(max_examples=200)
@given(plans(), st.data())
def test_what_was_received_and_what_is_left_add_up(run, data):
    """In whatever order the units end: nothing is lost, and nothing counts twice."""
    finished = data.draw(st.integers(0, len(run)))
    progress = progress_after(run, finished, WHOLE)
    received = WHOLE.run_seconds(progress.executed) + progress.attained_seconds
    assert received == pytest.approx(sum(WHOLE.seconds(e) for e in run[:finished]))
    left = seconds_after(run, finished, WHOLE, "sum")
    assert received + left == pytest.approx(WHOLE.run_seconds(run))
    path = seconds_after(run, finished, WHOLE, "critical_path")
    assert path <= longest_chain(run, WHOLE) <= path + received + 1e-9


def test_a_progress_is_told_by_stages():
    plan, first, *_ = fan()
    with pytest.raises(DemandError, match="progress_in_stages"):
        Progress([plan, first, replace(first, after=(0,))])
    underway = [
        Underway(SEARCH, (0,), 1.5, 1.5),
        Underway(MATH, (0,), 0.0),
    ]
    known = progress_in_stages([plan, first], underway, WHOLE)
    assert known == Progress([plan], "math + search", 2.0 + 1.5, 2.0)
    later = [plan, first, Execution(JOIN, 1, 1, after=(1,))]
    assert progress_in_stages(later, underway, WHOLE) == Progress(
        [plan], "math + search", 2.0 + 1.5 + 1.25, 2.0 + 1.25
    )
    with pytest.raises(DemandError, match="waits for unit 3"):
        progress_in_stages([plan], [Underway(MATH, (3,))])


@settings(max_examples=200)
@given(plans(), st.data())
def test_the_path_has_come_as_far_as_the_longest_chain_of_what_has_begun(run, data):
    """That of brute force, with nothing for the stages before."""
    finished = data.draw(st.integers(0, len(run)))
    progress = progress_after(run, finished, WHOLE)
    before = len(progress.executed)
    begun = [
        replace(execution, unit=MATH, seconds=0.0, parallelism=1, longest_seconds=None,
                longest_output_tokens=None) if number < before else execution
        for execution, number in zip(run, stage_numbers([e.after for e in run]), strict=True)
    ]  # fmt: skip
    assert progress.elapsed_seconds == longest_chain(begun[:finished], WHOLE)


def test_what_is_underway_goes_on_where_what_it_waited_for_left_off():
    first, second = Execution(MATH, seconds=5.0, after=()), Underway(JOIN, (0,), 2.0, 1.5)
    beside = Underway(SEARCH, (), 3.0, 3.0)
    progress = progress_in_stages([first], [beside, second], WHOLE)
    assert progress == Progress([], "math + search", 5.0 + 2.0 + 3.0, 5.0 + 1.5)


def test_a_graph_learns_stages():
    graph = PDGraph.fit([fan(), fan(1.0, 1.0, 1.0), [Execution(PLAN, 4, 1)]], cost=WHOLE)
    assert [unit.name for unit in graph.units] == ["plan", "math + search", "join"]
    assert graph.branches("plan") == {"math + search": pytest.approx(2 / 3), "end": 1 / 3}
    assert len(graph.samples("math + search")) == 2
    assert graph.runs[0] == tuple(fan())
    graph.check_unit(SEARCH)
    with pytest.raises(DemandError, match="kind"):
        graph.check_unit(Unit("search", "tool"))


def test_all_units_of_a_stage_are_warmed_where_it_follows():
    graph = PDGraph.fit([fan(), fan()[:2], fan()[:1], fan()[:1]], cost=WHOLE)
    backends = {"search": Pool(1, 2.0), "tool": Pool(1, 3.0)}
    known = {unit: (s.probability, s.warm_seconds) for unit, s in
             successors_of(graph, "plan", backends)}  # fmt: skip
    assert known == {SEARCH: (0.5, 2.0), MATH: (0.25, 3.0)}
    assert [graph.members(unit) for unit in graph.units[:2]] == [(PLAN,), (SEARCH, MATH)]


def every_walk(runs, count):
    """The distribution of all walks over the stages of `runs`, but for those of 1e-7 and less."""
    options = {}
    for run in runs:
        names = ["start", *(execution.unit.name for execution in run), "end"]
        seconds = [0.0, *(WHOLE.seconds(execution, count) for execution in run)]
        for at, each in enumerate(seconds):
            options.setdefault(names[at], []).append((each, names[at + 1]))
    ends, walking = [], [("start", 0.0, 1.0)]
    while walking:
        at, so_far, share = walking.pop()
        if at == "end":
            ends.append((so_far, share))
        elif share > 1e-7:
            each = share / len(options[at])
            walking += [(to, so_far + seconds, each) for seconds, to in options[at]]
    return Distribution(*zip(*ends, strict=True))


@pytest.mark.parametrize("count", ["sum", "critical_path"])
def test_both_demands_are_those_of_every_walk(count):
    runs = [fan(), fan(1.0, 1.0, 1.0), [*fan(7.0, 2.0, 2.0), Execution(PLAN, 8, 3)]]
    graph = PDGraph.fit(runs, cost=WHOLE)
    exact = every_walk([in_stages(run, WHOLE) for run in runs], count)
    drawn = graph.remaining(parallel_calls=count, walks=20_000)
    assert drawn.mean() == pytest.approx(exact.mean(), rel=0.02)
    shares = [
        [known.weights[known.values <= x].sum() for x in np.arange(0.1, 60.0, 0.25)]
        for known in (drawn, exact)
    ]
    assert np.abs(np.subtract(*shares)).max() < 0.015  # 0.0096 with a probability of 95 %
    whole = WholeRuns().remaining(graph)
    assert whole.mean() == pytest.approx(np.mean([WHOLE.run_seconds(run) for run in runs]))


def test_a_stage_in_progress_is_conditioned_on_what_its_units_received():
    graph = PDGraph.fit([fan(), fan(1.0, 1.0, 1.0)], cost=WHOLE)
    # Both searches of the longer fan are over, 7 of 10 seconds; the other took 3 in all.
    left = graph.remaining(progress_after(fan(), 3, WHOLE))
    assert set(np.unique(left.values)) == {10.0 - 7.0 + 4.0}
    told = DemandEstimator({"a": graph}, CurrentUnit())
    assert told("a", progress_after(fan(), 3, WHOLE)).mean() == 7.0
    strange = progress_in_stages(fan()[:1], [Underway(MATH, (0,), 1.0, 1.0)], WHOLE)
    assert told("a", strange).mean() > 0.0  # a stage never seen: by the seconds received alone
    assert told.fallbacks["a", "unit"] == 1


@pytest.mark.parametrize(
    "refinement",
    [*(CurrentUnit(), NearestRuns(), NoRefinement(), WholeRuns(), PromptRegression()),
     *(PearsonFilter(minimum=1), ProgressRegression())],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("count", ["sum", "critical_path"])
def test_every_refinement_answers_by_stages(refinement, count):
    """As it would of the same runs told as sequences of stages."""
    runs = [fan(at, 9.0 - at, 2.0 * at) for at in (1.0, 2.0, 5.0, 7.0)]
    ours, staged = (
        refinement.fit(PDGraph.fit(some, cost=WHOLE), count)
        for some in (runs, [in_stages(run, WHOLE) for run in runs])
    )
    for finished in range(5):
        progress = progress_after(runs[0], finished, WHOLE)
        left = ours.remaining(progress)
        assert left == staged.remaining(progress)
        assert np.isfinite(left.values).all()


def test_a_graph_of_stages_is_drawn_and_exported():
    pytest.importorskip("matplotlib")
    graph = PDGraph.fit([fan(), fan(1.0, 1.0, 1.0)], cost=WHOLE)
    found = graph.to_networkx()
    assert found.nodes["math + search"]["kind"] == "tool"
    assert found["plan"]["math + search"]["probability"] == 1.0
    assert "math + search" in "".join(text.get_text() for text in graph.figure().texts)
    for run in graph.draw_runs(5):
        assert [execution.unit.name for execution in run] == ["plan", "math + search", "join"]


def test_graphs_come_back_as_they_were_saved(tmp_path):
    for run, version in ((fan(), 4), (told([Execution(PLAN, 4, 1)] * 2), 4)):
        graph = PDGraph.fit([run], cost=WHOLE)
        graph.save(tmp_path / "graph.json")
        assert f'"version": {version}' in (tmp_path / "graph.json").read_text()
        again = PDGraph.load(tmp_path / "graph.json")
        assert again.runs == graph.runs
        assert again.remaining() == graph.remaining()
        DemandEstimator({"a": graph}, cost=WHOLE).save(tmp_path / "learned.json")
        learned = DemandEstimator.load(tmp_path / "learned.json")
        assert learned.graphs["a"].runs == graph.runs


def workload_of(runs, cost=WHOLE):
    n = len(runs)
    graph = PDGraph.fit(runs, cost=cost)
    demands = [cost.run_seconds(run) for run in runs]
    known = {"a": Distribution(demands)}
    return Workload(np.arange(n), demands, ["a"] * n, known, graphs={"a": graph}, runs=runs)


@settings(max_examples=50, deadline=None)
@given(st.lists(plans(), min_size=1, max_size=5))
def test_one_server_serves_the_units_in_their_order(runs):
    """A second of service a second: what could go side by side makes no difference."""
    plain = [[replace(execution, after=None) for execution in run] for run in runs]
    ours, theirs = (simulate(workload_of(some), Gittins()) for some in (runs, plain))
    np.testing.assert_array_equal(ours.completion_times, theirs.completion_times)
    estimator = DemandEstimator({"a": PDGraph.fit(runs, cost=WHOLE)}, WholeRuns())
    asked = simulate(workload_of(runs), Gittins(), estimator=estimator)
    assert asked.completion_times.sum() >= sum(WHOLE.run_seconds(run) for run in runs) - 1e-9


def test_a_call_is_foreseen_before_anything_of_its_stage_is_over():
    run = waiting([Execution(PLAN, 4, 1)] * 3, [None, (0,), (0,)])
    assert PendingCall.of_run("a", run, 1, cost=WHOLE).progress == Progress(run[:1])
    with pytest.raises(DemandError, match="in the middle of unit"):
        PendingCall.of_run("a", run, 2, cost=WHOLE)
    asked = []

    class Told:
        def predict(self, call):
            asked.append(len(call.progress.executed))
            return Distribution([1.0])

    simulate(workload_of([run]), Gittins(), predictor=Told())
    assert asked == [0, 1]


@pytest.mark.parametrize("count", ["sum", "critical_path"])
def test_calibration_compares_what_is_told_and_what_is_left_of_the_same(count):
    """Of runs that are all alike nothing is uncertain: told is what is left, or nothing asked."""
    told = DemandEstimator(
        {"a": PDGraph.fit([fan()] * 3, cost=WHOLE)}, CurrentUnit(), count, cost=WHOLE
    )
    report = calibrate(partial(told, "a"), [fan()], range(5), cost=WHOLE, parallel_calls=count)
    for point in report.points:
        assert (point.predicted, point.crps) == (point.observed, 0.0)
    asked = [point.after_units for point in report.points]
    assert asked == ([0, 1, 2, 3, 4] if count == "sum" else [0, 1, 4])
    assert report.points[1].observed == (14.0 if count == "sum" else 9.0)
    with pytest.raises(DemandError, match="the critical path between stages"):
        calibrate(partial(told, "a"), [fan()], (2,), cost=WHOLE, parallel_calls="critical_path")


def test_calls_that_go_beside_tools_are_drawn_as_calls():
    run = [*fan()[:2], Execution(JOIN, 3, 1, after=(0,)), Execution(LAST, 2, 2, after=(1, 2))]
    other = [*fan(1.0)[:2], Execution(JOIN, 9, 4, after=(0,)), Execution(LAST, 2, 2, after=(1, 2))]
    graph = PDGraph.fit([run, other], cost=WHOLE)
    drawn = graph.draw_runs(50)
    stages = {tuple(in_stages(one, WHOLE)[1:2]) for one in drawn}
    assert stages == {tuple(in_stages(one, WHOLE)[1:2]) for one in (run, other)}
    for one in drawn:
        for execution in one:
            assert execution.unit.kind == "llm" or execution.output_tokens == 0.0
    again = PDGraph.fit(drawn, cost=WHOLE)
    assert again.units == graph.units


def test_a_name_that_could_be_that_of_a_stage_is_refused_beside_others():
    odd = Execution(Unit("math + search", "tool"), seconds=1.0)
    beside = [replace(odd, after=()), Execution(PLAN, 1, 1, after=())]
    for refused in (
        lambda: PDGraph.fit([beside]),
        lambda: progress_in_stages([], [Underway(e.unit, ()) for e in beside]),
    ):
        with pytest.raises(DemandError, match="one stage may be taken for another"):
            refused()
    assert PDGraph.fit([[odd, Execution(PLAN, 1, 1)]]).units[0] == odd.unit


def test_units_of_a_given_graph_wait_for_the_one_before():
    with pytest.raises(DemandError, match=r"give it with after=None"):
        GivenUnit(MATH, [Execution(MATH, seconds=1.0, after=(3,))], {"end": 1.0})
