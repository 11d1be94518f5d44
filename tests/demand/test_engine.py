from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import (
    FCFS,
    SERPT,
    ClassMean,
    CostModel,
    DemandError,
    Distribution,
    Execution,
    Gittins,
    Job,
    Oracle,
    Policy,
    RandomOrder,
    Unit,
    Workload,
    hermes_applications,
    poisson_workload,
    simulate,
    with_deadlines,
)
from demand.policies import (
    EDF,
    LAS,
    MLFQ,
    VTC,
    Aging,
    DeadlineMix,
    DecayingLAS,
    Hysteresis,
    LeastSlack,
    PriorityClasses,
    RequestFCFS,
    TimeSlice,
    VirtualTime,
)
from demand.simulation.engine import Engine, simulate_engine
from tests.demand.engine_twin import step_by_step
from tests.demand.policy_zoo import Shy

THINK, CODE, TEST = Unit("think", "llm"), Unit("code", "llm"), Unit("test", "container")


POLICIES = [FCFS(), RandomOrder(), ClassMean(), SERPT(), Gittins(), Oracle()]
OTHERS = [
    RequestFCFS(),
    LAS(),
    EDF(),
    LeastSlack(),
    VTC(2.0),
    VirtualTime(2.0),
    Hysteresis(Oracle(), 5.0),
    TimeSlice(Gittins(), 2.5),
    Aging(SERPT(), 30.0, 0.5),
    PriorityClasses(Gittins()),
    DeadlineMix(EDF(), Gittins()),
    Shy(),
    MLFQ(1.0, queues=4),
    MLFQ(0.5, 1.0, 4, starvation_seconds=4.0),
    DecayingLAS(8.0, 2.0),
    TimeSlice(DecayingLAS(3.0), 2.0),
]
WHOLE_COST = CostModel(0.25, 1.0)  # sums of quarters are exact
MODES = ["none", "pause", "recompute", "swap"]


def one_unit(tokens, arrivals=None):
    """One job a request of (input, output) tokens; all at once unless told."""
    runs = [[Execution(THINK, given, made)] for given, made in tokens]
    n = len(runs)
    return Workload(
        arrivals or [0.0] * n, [1.0] * n, ["a"] * n, {"a": Distribution([1.0])}, runs=runs
    )


quarters = st.integers(0, 80).map(lambda n: n / 4)


@st.composite
def llms(draw):
    """Calls alike, or one longer than the others, which may be over with their prefill."""
    unit, given, calls = draw(st.sampled_from([THINK, CODE])), draw(st.integers(1, 20)), 1
    made = longest = draw(st.integers(1, 14))
    if draw(st.booleans()):
        calls = draw(st.integers(1, 4))
        made = draw(st.integers(1, longest))
    if calls == 1 or made == longest:
        return Execution(unit, given, longest, calls)
    mean = (longest + (calls - 1) * made) / calls
    return Execution(unit, given, mean, calls, longest_output_tokens=longest)


llm = llms()
container = st.builds(Execution, st.just(TEST), seconds=quarters)
runs = st.lists(st.one_of(llm, llm, llm, container), min_size=1, max_size=3)


@st.composite
def workloads(draw, run=runs):
    one = st.tuples(quarters, st.sampled_from("abc"), run, st.sampled_from("uv"), quarters)
    jobs = draw(st.lists(one, min_size=1, max_size=8))
    jobs.sort(key=lambda job: job[0])
    arrivals, names, executed, tenants, slack = zip(*jobs, strict=True)
    known = st.lists(st.integers(1, 60), min_size=1, max_size=4)
    return Workload(
        arrivals,
        [1.0] * len(jobs),
        names,
        {name: Distribution(draw(known)) for name in "abc"},
        deadlines=[a + s if s else np.inf for a, s in zip(arrivals, slack, strict=True)],
        tenants=tenants,
        weights={"u": 2.0},
        priorities=[int(s > 10.0) for s in slack],
        runs=executed,
    )


# Times that are sums of few halves: the order of summation then changes no digit.
engines = st.builds(
    Engine,
    max_requests=st.integers(1, 6),
    token_budget=st.integers(1, 24),
    blocks=st.integers(9, 24),
    block_tokens=st.integers(4, 6),
    preemption=st.sampled_from(MODES),
    base_seconds=st.sampled_from([0.25, 1.0]),
    prefill_seconds_per_token=st.sampled_from([0.0, 0.125]),
    decode_seconds_per_request=st.sampled_from([0.0, 0.125]),
    kv_seconds_per_token=st.sampled_from([0.0, 1 / 64]),
    swap_seconds_per_block=st.sampled_from([0.0, 0.125]),
    scheduling=st.just("by_rank"),
)


@st.composite
def running_first(draw):
    """Engines like vLLM, often too small for what comes."""
    return replace(
        draw(engines),
        preemption=draw(st.sampled_from(["none", "recompute"])),
        scheduling="running_first",
    )


def ends(served):
    """Whether every simulation ends.

    Shy moves back by being served: where KV is recomputed, two jobs can displace each other in
    turns, each before its prompt is computed.
    """
    engine, policy = served
    return engine.preemption != "recompute" or not isinstance(policy, Shy)


policies = st.sampled_from(POLICIES + OTHERS)
engines_and_policies = st.tuples(engines, policies).filter(ends)
like_vllm_and_policies = st.tuples(running_first(), policies).filter(ends)


@settings(max_examples=150, deadline=None)
@given(workloads(), engines_and_policies)
def test_jumping_over_equal_steps_changes_nothing(workload, served):
    assert_like_twin(workload, *served)


@settings(max_examples=250, deadline=None)
@given(workloads(), like_vllm_and_policies)
def test_the_same_where_running_requests_are_served_first(workload, served):
    assert_like_twin(workload, *served)


def assert_like_twin(workload, engine, policy):
    result = simulate_engine(workload, policy, engine, cost=WHOLE_COST)
    twin = step_by_step(workload, policy, engine, WHOLE_COST)
    np.testing.assert_array_equal(result.completion_times, twin.completion_times)
    np.testing.assert_array_equal(result.completion_steps, twin.completion_steps)
    for name in ("steps", "preemptions", "prefilled_again", "swapped_blocks", "peak_blocks"):
        assert getattr(result, name) == getattr(twin, name), name
    assert result.mean_batch * max(result.steps, 1) == pytest.approx(twin.requests)
    expected = [
        round(execution.parallelism * execution.output_tokens)
        for run in workload.runs
        for execution in run
        if execution.unit.kind == "llm"
    ]
    assert twin.produced == sum(expected)  # every token once, whatever was lost on the way


def test_equal_steps_are_jumped_over():
    result = simulate_engine(one_unit([(10, 500)] * 4), Gittins(), Engine.counting_steps(2))
    assert result.steps == 1000
    assert result.decisions < 30


@settings(max_examples=60, deadline=None)
@given(workloads(st.lists(st.builds(Execution, st.just(THINK), st.just(1), st.integers(1, 20)),
                          min_size=1, max_size=1)),
       st.sampled_from(POLICIES))  # fmt: skip
def test_one_slot_without_prefill_is_the_single_server_queue(workload, policy):
    """Steps of a second, a token a second: preemption at whole seconds."""
    arrivals = np.ceil(workload.arrivals)
    demands = [run[0].output_tokens for run in workload.runs]
    whole = replace(workload, arrivals=arrivals, demands=demands, deadlines=None)
    engine = Engine.counting_steps(max_requests=1)
    result = simulate_engine(whole, policy, engine, cost=CostModel(0.0, 1.0))
    expected = simulate(whole, policy)
    np.testing.assert_array_equal(result.completion_times, expected.completion_times)


def test_a_quantum_that_ends_a_rounding_early_is_not_missed():
    """105 tokens of 0.06 s are 6.3 s, three quanta of 2.1 s a rounding more: still three."""
    workload, cost = one_unit([(1, 120), (1, 120)]), CostModel(0.0, 0.06)
    assert 105 * 0.06 < 3 * 2.1
    result = simulate_engine(workload, LAS(2.1), Engine.counting_steps(1), cost=cost)
    assert result.completion_times.tolist() == [105 + 105 + 15, 240]
    assert result.preemptions == 6


@pytest.mark.parametrize(
    ("scheduling", "mode", "policy"),
    [  # every mode under two policies, and every policy under two modes or more
        ("by_rank", "none", Gittins()),
        ("by_rank", "none", LeastSlack()),
        ("by_rank", "pause", LAS(20.0)),
        ("by_rank", "pause", VTC(10.0)),
        ("by_rank", "recompute", Gittins()),
        ("by_rank", "recompute", VTC(10.0)),
        ("by_rank", "swap", FCFS()),
        ("by_rank", "swap", LAS(20.0)),
        ("running_first", "none", FCFS()),
        ("running_first", "none", LeastSlack()),
        ("running_first", "recompute", Gittins()),
        ("running_first", "recompute", LAS(20.0)),
    ],
    ids=repr,
)
def test_a_crowded_engine_is_jumped_over_rightly(scheduling, mode, policy):
    """Applications of Hermes with costs of their own, a wide batch, and too few blocks."""
    workload = with_deadlines(poisson_workload(hermes_applications(), 60.0, 16, 3), 2.0)
    engine = Engine(32, 512, 900, preemption=mode, kv_seconds_per_token=1e-7, scheduling=scheduling)
    result = simulate_engine(workload, policy, engine, cost=CostModel())
    twin = step_by_step(workload, policy, engine, CostModel())
    np.testing.assert_allclose(result.completion_times, twin.completion_times, rtol=1e-9)
    for name in ("steps", "preemptions", "prefilled_again", "swapped_blocks", "peak_blocks"):
        assert getattr(result, name) == getattr(twin, name), name
    assert result.peak_blocks > 850  # they do run out


def test_a_call_that_is_over_with_its_prefill_leaves_the_others_decoding():
    """While two calls decode, the third, of one token, ends; nothing of the unit waits then."""
    long = Execution(THINK, 4, 14, parallelism=3, longest_output_tokens=40)
    workload = Workload(
        [0, 10], [1, 1], "ab", {n: Distribution([1.0]) for n in "ab"}, priorities=[1, 0],
        runs=[[long], [Execution(THINK, 40, 3)]],
    )  # fmt: skip
    engine = Engine.counting_steps(8, token_budget=4, blocks=12, block_tokens=4)
    policy = PriorityClasses(FCFS())
    result = simulate_engine(workload, policy, engine, cost=WHOLE_COST)
    assert result.steps == step_by_step(workload, policy, engine, WHOLE_COST).steps == 54
    alone = Workload([0], [1], "a", {"a": Distribution([1.0])}, runs=[[long]])
    assert simulate_engine(alone, policy, engine, cost=WHOLE_COST).decisions < 10


def test_a_rank_that_moves_as_its_job_stops_counts_from_the_next_step():
    workload = Workload(
        [0, 0, 10.25], [1, 1, 1], "cca",
        {"c": Distribution([23.0]), "a": Distribution([22.0])},
        runs=[[Execution(THINK, 16, 7, 3)], [Execution(THINK, 12, 5)], [Execution(THINK, 1, 1)]],
    )  # fmt: skip
    engine = Engine.counting_steps(2, token_budget=20, blocks=8, block_tokens=5)
    policy = Hysteresis(ClassMean(), 5.0)
    result = simulate_engine(workload, policy, engine, cost=WHOLE_COST)
    twin = step_by_step(workload, policy, engine, WHOLE_COST)
    np.testing.assert_array_equal(result.completion_times, twin.completion_times)
    assert result.completion_times[2] == 6.75


def test_events_are_counted_one_by_one():
    """Two jobs of one slot: the second displaces the first at second 5, which goes on later."""
    workload = one_unit([(4, 10), (4, 2)], arrivals=[0, 5])
    result = simulate_engine(workload, Oracle(), Engine.counting_steps(1), cost=CostModel(0.0, 1.0))
    arrivals, submitted, preempted, over, steps = 2, 2, 1, 2, 12
    assert result.events == arrivals + submitted + preempted + over + steps
    run = [Execution(THINK, 1, 3, parallelism=2), Execution(TEST, seconds=2.0)]
    workload = Workload([0], [1], "a", {"a": Distribution([1.0])}, runs=[run])
    assert simulate_engine(workload, FCFS(), Engine.counting_steps(2)).events == 1 + 2 + 2 + 1 + 3


def test_width_two_takes_half_the_steps():
    """Six requests of 64 tokens at width 2: 192 steps, measured so on transformers 5.23."""
    workload = one_unit([(5, 64)] * 6)
    result = simulate_engine(workload, FCFS(), Engine.counting_steps(2))
    assert result.steps == 192
    assert result.completion_steps.tolist() == [64, 64, 128, 128, 192, 192]
    assert result.completion_times.tolist() == [64, 64, 128, 128, 192, 192]
    assert result.mean_completion_steps == 128.0


def test_prefill_in_chunks_shares_the_budget():
    """Budget 4: three steps for 10 tokens, and the second prompt gets the 2 left of the third."""
    workload = one_unit([(10, 2), (5, 1)])
    result = simulate_engine(workload, FCFS(), Engine.counting_steps(8, token_budget=4))
    # Steps: 4 | 4 | 2 + 2 | 1 decode + 3: both end with the fourth.
    assert result.completion_times.tolist() == [4, 4]
    assert result.mean_batch == pytest.approx((1 + 1 + 2 + 2) / 4)


def test_times_of_steps_add_up():
    engine = Engine(4, 100, 100, 4, "none", 1.0, 0.5, 0.25, 0.125, 0.0)
    result = simulate_engine(one_unit([(3, 3)]), FCFS(), engine)
    prefill = 1.0 + 3 * 0.5 + 3 * 0.125
    assert result.mean == prefill + (1.25 + 4 * 0.125) + (1.25 + 5 * 0.125)
    assert result.peak_blocks == 2  # 5 tokens of KV: the last one produced has none


def test_calls_of_a_unit_run_side_by_side_and_the_longest_ends_it():
    run = [Execution(THINK, 2, 4, parallelism=3, longest_output_tokens=8), Execution(CODE, 1, 1)]
    workload = Workload([0], [1], ["a"], {"a": Distribution([1.0])}, runs=[run])
    result = simulate_engine(workload, FCFS(), Engine.counting_steps(3))
    assert result.completion_times.tolist() == [9]
    assert result.mean_batch * 9 == 8 + 2 + 2 + 1


@pytest.mark.parametrize(
    ("mode", "again", "copied", "end"),
    [("none", 0, 0, [10, 7]), ("pause", 0, 0, [12, 2]), ("recompute", 8, 0, [12, 2]),
     ("swap", 0, 4, [13, 2.5])],
)  # fmt: skip
def test_what_becomes_of_a_displaced_request(mode, again, copied, end):
    """At second 5 a shorter job comes; the first holds 4 prompt and 4 produced tokens by then."""
    engine = replace(
        Engine.counting_steps(1, preemption=mode, block_tokens=4), swap_seconds_per_block=0.25
    )
    workload = one_unit([(4, 10), (4, 2)], arrivals=[0, 5])
    result = simulate_engine(workload, Oracle(), engine, cost=CostModel(0.0, 1.0))
    assert result.completion_times.tolist() == end
    assert (result.prefilled_again, result.swapped_blocks) == (again, copied)
    assert result.preemptions == (mode != "none")


def test_the_last_in_order_loses_its_blocks_when_they_run_out():
    """Six blocks of 4 tokens for two requests that need four each: one waits half-way."""
    engine = Engine.counting_steps(2, blocks=6, block_tokens=4)
    result = simulate_engine(one_unit([(4, 13), (4, 13)]), FCFS(), engine)
    assert result.completion_times[0] == 13
    assert result.prefilled_again > 0
    assert result.peak_blocks == 6
    roomy = replace(engine, blocks=8)
    assert simulate_engine(one_unit([(4, 13), (4, 13)]), FCFS(), roomy).prefilled_again == 0


def test_request_fcfs_is_expressible():
    """A job that comes back from a tool queues anew; under application FCFS it goes first."""
    first = [Execution(THINK, 1, 2), Execution(TEST, seconds=1.0), Execution(CODE, 1, 2)]
    workload = Workload(
        [0, 1, 2], [1] * 3, ["a"] * 3, {"a": Distribution([1.0])},
        runs=[first, [Execution(THINK, 1, 4)], [Execution(THINK, 1, 4)]],
    )  # fmt: skip
    engine = Engine.counting_steps(1)
    assert simulate_engine(workload, FCFS(), engine).completion_times.tolist() == [5, 7, 10]
    assert simulate_engine(workload, RequestFCFS(), engine).completion_times.tolist() == [12, 5, 8]


def test_runs_repeat():
    rng = np.random.default_rng(0)
    tokens = [(int(i), int(o)) for i, o in rng.integers(1, 300, (40, 2))]
    workload = one_unit(tokens, arrivals=np.sort(rng.random(40) * 30).tolist())
    for policy in (RandomOrder(), Gittins()):
        first = simulate_engine(workload, policy, Engine(max_requests=4), seed=3)
        again = simulate_engine(workload, policy, Engine(max_requests=4), seed=3)
        assert first.completion_times.tolist() == again.completion_times.tolist()
        assert first.summary().items() >= {"steps": again.steps}.items()
    other = simulate_engine(workload, RandomOrder(), Engine(max_requests=4), seed=4)
    assert other.completion_times.tolist() != first.completion_times.tolist()


def test_bad_input_is_refused():
    workload = one_unit([(100, 10)])
    for limit in ("max_requests", "token_budget", "blocks", "block_tokens"):
        with pytest.raises(DemandError, match=f"{limit} is 0; expected a whole number"):
            Engine(**{limit: 0})
    with pytest.raises(DemandError, match=r"blocks is 2\.5"):
        Engine(blocks=2.5)
    with pytest.raises(DemandError, match="kv_seconds_per_token is nan"):
        Engine(kv_seconds_per_token=float("nan"))
    with pytest.raises(DemandError, match="decoding takes no time"):
        Engine(base_seconds=0.0, decode_seconds_per_request=0.0)
    with pytest.raises(DemandError, match="preemption is 'kill'; expected one of none, pause"):
        Engine(preemption="kill")
    with pytest.raises(DemandError, match="scheduling is 'fair'; expected one of running_first"):
        Engine(scheduling="fair")
    for mode in ("pause", "swap"):
        with pytest.raises(DemandError, match='or give scheduling="by_rank" as well'):
            Engine(preemption=mode)
    with pytest.raises(DemandError, match="takes 7 blocks of 16 tokens; the engine has 6"):
        simulate_engine(workload, FCFS(), Engine(blocks=6))
    assert simulate_engine(workload, FCFS(), Engine(blocks=7)).peak_blocks == 7
    with pytest.raises(DemandError, match="has no runs"):
        simulate_engine(replace(workload, runs=None), FCFS())
    with pytest.raises(DemandError, match="the run of job 0 is empty"):
        simulate_engine(replace(workload, runs=[[]]), FCFS())
    with pytest.raises(DemandError, match="known by its seconds alone"):
        simulate_engine(replace(workload, runs=[[Execution(THINK, seconds=2.0)]]), FCFS())


def test_a_policy_that_ranks_nan_is_refused():
    class Broken(Policy):
        def rank(self, job: Job, now: float) -> float:
            return float("nan")

    with pytest.raises(DemandError, match="ranked job 0 NaN"):
        simulate_engine(one_unit([(1, 1)]), Broken())


def test_repr_reads():
    result = simulate_engine(one_unit([(5, 4)]), FCFS(), Engine.counting_steps(2))
    assert repr(result) == (
        "EngineResult(FCFS(), 1 jobs, mean 4 s, p95 4 s, 4 steps of 1 requests, 0 preemptions, "
        "0 tokens prefilled again, p95 TTFT 1 s, p95 TBT 1 s)"
    )


def test_a_policy_whose_ranks_rise_by_being_served_is_jumped_over_rightly():
    runs = [[Execution(THINK, 14, 14)], [Execution(THINK, 1, 13)]]
    workload = Workload([0.25, 0.25], [1.0, 1.0], "bb", {"b": Distribution([1.0])}, runs=runs)
    engine = Engine(
        max_requests=6,
        token_budget=19,
        blocks=9,
        block_tokens=4,
        preemption="recompute",
        base_seconds=0.25,
        prefill_seconds_per_token=0.0,
        decode_seconds_per_request=0.0,
        swap_seconds_per_block=0.0,
    )
    result = simulate_engine(workload, Shy(), engine, cost=WHOLE_COST)
    twin = step_by_step(workload, Shy(), engine, WHOLE_COST)
    np.testing.assert_array_equal(result.completion_times, twin.completion_times)
