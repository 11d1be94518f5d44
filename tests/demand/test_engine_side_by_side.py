"""Units side by side on the engine: like a step at a time, and never under the critical path."""

from dataclasses import replace

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
    Engine,
    Execution,
    Gittins,
    PDGraph,
    Pool,
    Unit,
    Workload,
    simulate_engine,
)
from demand.dependencies import parents, path_ends
from demand.policies import FCFS, LAS, SERPT, VTC, Hysteresis, LeastSlack
from demand.simulation.engine import LRU
from demand.simulation.engine.next_use import NEVER_SECONDS, next_use
from demand.simulation.engine.waits import Waits
from demand.stages import progress_after
from tests.demand.engine_twin import step_by_step
from tests.demand.plans import afters, longest_chain, plans, told, waiting
from tests.demand.test_engine import (
    POLICIES,
    TEST,
    THINK,
    WHOLE_COST,
    assert_like_twin,
    container,
    engines_and_policies,
    like_vllm_and_policies,
    llm,
    policies,
    runs,
    workloads,
)
from tests.demand.test_engine_prefixes import engines_that_keep
from tests.demand.test_engine_prefixes import runs as runs_that_share
from tests.demand.test_engine_requests import check_against_every_token

beside = plans(st.one_of(llm, llm, container), most=5)
LOOK = Unit("look", "search")
STEPS = CostModel(0.0, 1.0)
"""A step a token, and a prompt is computed in the step of its first: seconds of `WIDE`."""
WIDE = Engine.counting_steps(64, preemption="none", scheduling="running_first")


@settings(max_examples=150, deadline=None)
@given(workloads(beside), engines_and_policies)
def test_jumping_over_equal_steps_changes_nothing(workload, served):
    assert_like_twin(workload, *served)


@settings(max_examples=120, deadline=None)
@given(workloads(beside), like_vllm_and_policies)
def test_the_same_where_running_requests_are_served_first(workload, served):
    assert_like_twin(workload, *served)


@pytest.mark.parametrize(
    ("scheduling", "mode", "policy"),
    [  # every mode under two policies, and every policy under three modes
        ("by_rank", "none", LAS(3.0)),
        ("by_rank", "none", Gittins()),
        ("by_rank", "pause", VTC(2.0)),
        ("by_rank", "pause", Hysteresis(SERPT(), 5.0)),
        ("by_rank", "recompute", Gittins()),
        ("by_rank", "recompute", Hysteresis(SERPT(), 5.0)),
        ("by_rank", "swap", LAS(3.0)),
        ("by_rank", "swap", VTC(2.0)),
        ("running_first", "none", VTC(2.0)),
        ("running_first", "none", Hysteresis(SERPT(), 5.0)),
        ("running_first", "recompute", LAS(3.0)),
        ("running_first", "recompute", Gittins()),
    ],
)
def test_a_crowded_engine(scheduling, mode, policy):
    """Plans of three to six units, most of them calls, with too few places and blocks."""
    rng, executed = np.random.default_rng(5), []
    for _ in range(25):
        units = [
            Execution(THINK, *rng.integers(1, 90, 2).tolist(), int(rng.integers(1, 3)))
            if rng.random() < 0.8
            else Execution(TEST, seconds=float(rng.integers(0, 9)))
            for _ in range(rng.integers(3, 7))
        ]
        sets = [rng.random(at) < 0.5 for at in range(len(units))]
        executed.append(waiting(units, [tuple(np.flatnonzero(one).tolist()) for one in sets]))
    known = {"a": Distribution([4.0, 9.0, 30.0])}
    arrivals = np.sort(rng.random(25) * 20)
    workload = Workload(arrivals, [1.0] * 25, ["a"] * 25, known, runs=executed)
    engine = Engine(6, 64, 40, 16, mode, kv_seconds_per_token=1e-6, scheduling=scheduling)
    result = simulate_engine(workload, policy, engine)
    twin = step_by_step(workload, policy, engine)
    check_against_every_token(result, twin, 0.9, 0.12345)
    np.testing.assert_allclose(result.completion_times, twin.completion_times)
    for name in ("steps", "preemptions", "prefilled_again", "swapped_blocks", "peak_blocks"):
        assert getattr(result, name) == getattr(twin, name), name


def one_job(run):
    return Workload([0.0], [1.0], ["a"], {"a": Distribution([1.0])}, runs=[run])


@given(plans(st.one_of(llm, st.builds(Execution, st.just(TEST), seconds=st.integers(0, 9)))))
def test_alone_on_a_wide_engine_a_run_takes_its_critical_path(run):
    result = simulate_engine(one_job(run), FCFS(), WIDE, cost=STEPS)
    assert result.completion_times.tolist() == [longest_chain(run, STEPS)]
    flat = [replace(execution, after=None) for execution in run]
    in_turn = simulate_engine(one_job(flat), FCFS(), WIDE, cost=STEPS)
    assert in_turn.completion_times >= result.completion_times


@settings(deadline=None)
@given(workloads(beside), policies, st.integers(1, 6))
def test_no_run_is_over_before_its_critical_path(workload, policy, width):
    engine = replace(WIDE, max_requests=width)
    result = simulate_engine(workload, policy, engine, cost=WHOLE_COST)
    paths = [longest_chain(run, STEPS) for run in workload.runs]
    assert (result.completion_times >= np.array(paths) - 1e-9).all()


@settings(deadline=None)
@given(workloads(runs), engines_and_policies | like_vllm_and_policies)
def test_a_chain_that_is_told_is_the_sequence(workload, served):
    engine, policy = served
    chains = replace(workload, runs=[told(run) for run in workload.runs])
    ours, theirs = (
        simulate_engine(some, policy, engine, cost=WHOLE_COST) for some in (chains, workload)
    )
    np.testing.assert_array_equal(ours.completion_times, theirs.completion_times)
    for name in ("steps", "decisions", "events", "busy_seconds", "preemptions"):
        assert getattr(ours, name) == getattr(theirs, name), name


learned_units = st.lists(st.one_of(llm, llm, container), min_size=4, max_size=4)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(learned_units, afters(4)), min_size=1, max_size=6),
    st.lists(st.integers(0, 60), min_size=6, max_size=6),
    st.sampled_from([Gittins(), SERPT(), LeastSlack(0.5), Hysteresis(Gittins(), 2.0)]),
    like_vllm_and_policies | engines_and_policies,
)
def test_what_an_estimator_says_is_asked_at_the_same_moments(executed, arrivals, policy, served):
    """Step by step, and jumping over equal steps: with tools that end in the middle of a jump."""
    plan = [waiting(*one) for one in executed]
    n, times = len(plan), [at / 4 for at in sorted(arrivals)]
    workload = Workload(
        times[:n], [1.0] * n, ["a"] * n, {"a": Distribution([5.0, 20.0])}, runs=plan,
        deadlines=[at + 40.0 for at in times[:n]],
    )  # fmt: skip

    def outcome():
        graph = PDGraph.fit(plan, cost=WHOLE_COST)
        asked = []
        estimator = DemandEstimator({"a": graph}, CurrentUnit(walks=20))

        def ask(application, progress):
            asked.append(progress)
            return estimator(application, progress)

        result = simulate_engine(workload, policy, served[0], estimator=ask, cost=WHOLE_COST)
        return result.completion_times.tolist(), result.preemptions, asked

    jumped = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("demand.simulation.engine.simulate.identical_steps", lambda *_: 1)
        assert outcome() == jumped


def test_calls_that_are_over_count_where_others_of_their_unit_have_not_begun():
    """Two calls one after the other, for want of room, beside a tool that ends between them."""
    run = [Execution(THINK, 4, 3, 2, after=()), Execution(TEST, seconds=4.0, after=())]
    one_by_one = Engine.counting_steps(1, preemption="none", scheduling="running_first")
    seen = []

    def ask(_, progress):
        seen.append(progress)
        return Distribution([1.0])

    simulate_engine(one_job(run), FCFS(), one_by_one, estimator=ask, cost=CostModel(0.25, 1.0))
    (found,) = seen
    assert len(found.executed) == 0
    assert found.attained_seconds == 4.0 + 4 * 0.25 + 3 * 1.0  # the tool's, and those of one call


def test_what_was_received_is_told_of_all_that_is_underway():
    """Two calls beside a tool: when the tool is over, what the others have received counts."""
    run = waiting(
        [Execution(THINK, 4, 2), Execution(THINK, 4, 9), Execution(TEST, seconds=3.0),
         Execution(THINK, 4, 1)],
        [None, (0,), (0,), (1, 2)],
    )  # fmt: skip
    seen = []

    def ask(_, progress):
        seen.append(progress)
        return Distribution([1.0])

    simulate_engine(one_job(run), FCFS(), WIDE, estimator=ask, cost=STEPS)
    first, at_tool, at_join = seen
    assert (len(first.executed), first.current) == (1, None)
    # The tool took 3 s of its own; the call beside it made 2 tokens in the steps before.
    assert (at_tool.current, at_tool.attained_seconds) == ("test + think", 3.0 + 2.0)
    assert [execution.unit.name for execution in at_join.executed] == ["think", "test + think"]


@settings(max_examples=80, deadline=None)
@given(
    plans(
        st.builds(Execution, st.sampled_from([TEST, LOOK]), seconds=st.integers(1, 9)),
        most=7,
    )
)
def test_the_estimator_is_told_what_the_run_says_after_as_many_units(run):
    """Of tools, which receive nothing until they are over, in the order in which these end."""
    ends = path_ends([execution.after for execution in run], [e.seconds for e in run])
    seen, order = [], []

    def ask(_, progress):
        seen.append(progress)
        return Distribution([1.0])

    def end(waits, position):
        order.append(position)
        return waits_end(waits, position)

    waits_end = Waits.end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Waits, "end", end)
        result = simulate_engine(one_job(run), FCFS(), WIDE, estimator=ask, cost=STEPS)
    assert result.completion_times == max(ends)
    order = order or list(range(len(run)))  # of a sequence
    assert [ends[at] for at in order] == sorted(ends)
    waits = parents([execution.after for execution in run])
    as_ended = [
        replace(run[at], after=tuple(order.index(before) for before in waits[at])) for at in order
    ]
    assert seen == [progress_after(as_ended, n, STEPS) for n in range(1, len(run))]


def test_a_unit_that_begins_at_that_moment_is_of_the_stage_that_is_asked_about():
    run = [Execution(TEST, seconds=2.0, after=()), Execution(LOOK, seconds=4.0, after=()),
           Execution(THINK, 1, 30, after=(0,)),
           Execution(TEST, seconds=9.0, after=(1,))]  # fmt: skip
    seen = []

    def ask(_, progress):
        seen.append((progress.current, progress.attained_seconds))
        return Distribution([1.0])

    simulate_engine(one_job(run), FCFS(), WIDE, estimator=ask, cost=STEPS)
    assert seen == [("look + test", 2.0), ("test + think", 1.0), ("test + think", 9.0 + 10.0)]


def test_what_is_left_of_the_path_is_right_where_a_later_stage_has_run():
    """A tool of 12 s beside two of 5 s, one after the other: after 10 s a call of 3 s and 2 s."""
    run = [Execution(TEST, seconds=5.0, after=()), Execution(TEST, seconds=12.0, after=()),
           Execution(LOOK, seconds=5.0, after=(0,)),
           Execution(THINK, 1, 3, after=(1, 2))]  # fmt: skip
    graph = PDGraph.fit([run] * 3, cost=STEPS)
    known = DemandEstimator({"a": graph}, CurrentUnit(), "critical_path", cost=STEPS)
    told = []

    def ask(application, progress):
        left = known(application, progress)
        told.append((len(progress.executed), left.mean()))
        return left

    simulate_engine(one_job(run), FCFS(), WIDE, estimator=ask, cost=STEPS)
    # By stages the look comes after both tools, so that 5 s more are told than are left.
    assert told == [(0, 7.0 + 5.0 + 3.0), (0, 2.0 + 5.0 + 3.0), (2, 3.0)]


@st.composite
def plans_of_agents(draw):
    """Units of which no two of one name go side by side: such wait for each other."""
    run, last = [], {}
    for at, execution in enumerate(draw(runs_that_share)):
        name = execution.unit.name
        before = draw(st.sets(st.integers(0, at - 1))) if at else set()
        run.append(replace(execution, after=(*before, *last.get(name, ()))))
        last[name] = (at,)
    return run


@settings(max_examples=120, deadline=None)
@given(workloads(plans_of_agents()), engines_that_keep(), st.sampled_from(POLICIES), st.booleans())
def test_what_calls_leave_is_found_by_those_of_their_unit(workload, engine, policy, knows):
    executed = {name: [] for name in "abc"}
    for name, run in zip(workload.applications, workload.runs, strict=True):
        executed[name].append(run)
    if knows:
        graphs = {n: PDGraph.fit(r, cost=WHOLE_COST) for n, r in executed.items() if r}
        workload = replace(workload, graphs=graphs)
    assert_like_twin(workload, engine, policy)
    result = simulate_engine(workload, policy, engine, cost=WHOLE_COST)
    twin = step_by_step(workload, policy, engine, WHOLE_COST)
    assert (result.prefixes.looked_up, result.prefixes.found) == (twin.looked_up, twin.found)
    assert result.prefixes.findable == twin.findable


def test_the_next_use_is_that_of_the_longest_path():
    """A thought, beside a tool of 9 s one of 2 s, and a thought that waits for both."""
    run = waiting(
        [Execution(THINK, 4, 2), Execution(TEST, seconds=9.0), Execution(TEST, seconds=2.0),
         Execution(THINK, 4, 1)],
        [None, (0,), (0,), (1, 2)],
    )  # fmt: skip
    known = next_use(PDGraph.fit([run]), "think", CostModel())
    assert known.values.tolist() == [9.0, NEVER_SECONDS]
    assert next_use(PDGraph.fit([told(run)]), "think", CostModel()).values[0] == 11.0
    mixed = [*run[:1], Execution(THINK, 4, 1, after=(0,)), Execution(TEST, seconds=1.0, after=(0,))]
    assert next_use(PDGraph.fit([mixed]), "test", CostModel()).values[0] == NEVER_SECONDS


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"backends": {"llm": Pool(1, 2.0)}}, "backends know of one unit of a job at a time"),
        ({"engine": replace(WIDE, retention=LRU())}, "two units 'think' side by side, and what a"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(given, says):
    run = waiting([Execution(THINK, 1, 1)] * 2, [None, ()])
    with pytest.raises(DemandError, match=says):
        simulate_engine(one_job(run), FCFS(), **given)
    simulate_engine(one_job(told(run[:1])), FCFS(), **given)


def test_units_that_wait_for_later_ones_are_refused():
    run = waiting([Execution(THINK, 1, 1)] * 2, [(1,), None])
    with pytest.raises(DemandError, match="unit 0 of the run of job 0 waits for unit 1"):
        simulate_engine(one_job(run), FCFS())
