"""Several engines behind a router, against the single engine, a twin, and by hand."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import (
    FCFS,
    VTC,
    CostModel,
    DemandError,
    DemandEstimator,
    Distribution,
    Engine,
    Execution,
    Gittins,
    Job,
    Pool,
    Unit,
    Workload,
    closed_loop,
    hermes_applications,
    poisson_workload,
    simulate_cluster,
    simulate_engine,
)
from demand.prewarm import AlwaysAtStart
from demand.routing import (
    ExpectedDemand,
    LeastLoaded,
    PrefixAffinity,
    RandomEngine,
    ReadyUnit,
    Router,
    WeightedScores,
)
from demand.routing.load import LOADS
from demand.simulation.engine import LRU, KeepAll, NextUse
from demand.simulation.engine.calls import call_groups
from tests.demand.engine_twin import step_by_step
from tests.demand.test_engine import (
    POLICIES,
    WHOLE_COST,
    engines_and_policies,
    like_vllm_and_policies,
    workloads,
)
from tests.demand.test_engine_prefixes import engines_that_keep, with_graphs

THINK, CODE, TOOL = Unit("think", "llm"), Unit("code", "llm"), Unit("tool", "tool")


@dataclass(frozen=True)
class Noting(Router):
    """Notes what of a unit's prompt is found on each engine, and goes to the first."""

    def new_state(self, engines):
        return NOTED

    def choose(self, unit, engines, state):
        state.append((unit.now, unit.job.index, [one.found_tokens(unit) for one in engines]))
        return 0


NOTED: list = []


def test_a_router_sees_what_is_still_kept_in_the_middle_of_equal_steps():
    """A call that decodes takes blocks of what was left while a tool runs, step by step."""
    names = {name: Distribution([1.0]) for name in "ab"}
    first = [Execution(THINK, 8, 1), Execution(TOOL, seconds=14.0)]
    runs = [[*first, Execution(THINK, 10, 1, shared_tokens=8)], [Execution(CODE, 2, 17)]]
    workload = Workload([0.0, 0.5], [1.0] * 2, "ab", names, runs=runs)
    engine = Engine(4, 100, 10, 2, "none", 1.0, 0.0, 0.0, retention=LRU())
    NOTED.clear()
    result = simulate_cluster(workload, FCFS(), engine, 2, Noting())
    (found,) = [seen for now, job, seen in NOTED if job == 0 and now > 0]
    assert found == [4, 0]
    assert result.prefixes.found <= 4


@dataclass(frozen=True)
class Looking(Router):
    """Goes by all that a router can see, in turns, and by chance where that says nothing."""

    def new_state(self, engines):
        return itertools.count()

    def choose(self, unit, engines, state):
        names = "requests", "waiting", "prompt_tokens", "kv_share"
        seen = [
            [float(getattr(engine, name)) for name in names] + [float(engine.found_tokens(unit))]
            for engine in engines
        ]
        by = next(state) % 5
        return max(engines, key=lambda engine: (seen[engine.number][by], -engine.number)).number


ROUTERS = [
    RandomEngine(3),
    *(LeastLoaded(by) for by in ("requests", "waiting", "prompt_tokens", "kv_share")),
    PrefixAffinity(1.0),
    PrefixAffinity(float("inf"), "prompt_tokens"),
    ExpectedDemand(),
    ExpectedDemand(0.0),
    ExpectedDemand(10.0),
    WeightedScores(),
    WeightedScores(1.0, 0.0, 3.0),
    Looking(),
]
routers = st.sampled_from(ROUTERS)
served_by = st.one_of(engines_and_policies, like_vllm_and_policies)


def assert_same_as_one_engine(workload, policy, engine, router, **more):
    """Every figure of one engine behind a router is that of the engine, bit by bit."""
    one = simulate_engine(workload, policy, engine, **more)
    cluster = simulate_cluster(workload, policy, engine, 1, router, **more)
    [share] = cluster.engines
    np.testing.assert_array_equal(cluster.completion_times, one.completion_times)
    for name in ("events", "preemptions", "steps", "busy_seconds", "backends", "prefixes"):
        assert getattr(cluster, name) == getattr(one, name), name
    for name in ("steps", "decisions", "busy_seconds", "mean_batch", "preemptions", "prefixes",
                 "prefilled_again", "swapped_blocks", "peak_blocks"):  # fmt: skip
        assert getattr(share, name) == getattr(one, name), name
    for name in ("job", "unit", "call", "ttft", "tpot", "finished", "kv_block_seconds"):
        ours, theirs = getattr(share.requests, name), getattr(one.requests, name)
        np.testing.assert_array_equal(ours, theirs)
    assert cluster.moves == 0


@settings(max_examples=60, deadline=None)
@given(workloads(), served_by, routers)
def test_one_engine_behind_a_router_is_that_engine(workload, served, router):
    engine, policy = served
    cost = CostModel(0.1, 0.7)  # nothing is exact: rounding has to be the same
    assert_same_as_one_engine(workload, policy, engine, router, cost=cost)


@settings(max_examples=60, deadline=None)
@given(with_graphs(), engines_that_keep(), st.sampled_from(POLICIES), routers)
def test_so_it_is_where_it_keeps_kv(workload, engine, policy, router):
    engine = replace(engine, decode_seconds_per_request=0.1, kv_seconds_per_token=1e-3)
    assert_same_as_one_engine(workload, policy, engine, router)


def assert_like_twin(workload, policy, engine, count, router):
    cluster = simulate_cluster(workload, policy, engine, count, router, cost=WHOLE_COST)
    twin = step_by_step(workload, policy, engine, WHOLE_COST, engines=count, router=router)
    np.testing.assert_array_equal(cluster.completion_times, twin.completion_times)
    assert cluster.moves == twin.moves
    for share, theirs in zip(cluster.engines, twin.servers, strict=True):
        for name in ("units", "steps", "preemptions", "prefilled_again", "swapped_blocks",
                     "peak_blocks"):  # fmt: skip
            assert getattr(share, name) == getattr(theirs, name), (share.number, name)
        assert share.mean_batch * max(share.steps, 1) == pytest.approx(theirs.requests)
        prefixes = share.prefixes
        assert prefixes[:3] == (theirs.looked_up, theirs.found, theirs.findable)
        assert prefixes.held_block_seconds == pytest.approx(theirs.held_block_seconds)
        assert prefixes.found <= prefixes.findable <= prefixes.looked_up
        mine = [call for call in twin.calls if call.server is theirs]
        np.testing.assert_array_equal(
            share.requests.ttft, [call.token_seconds[0] - call.requested for call in mine]
        )
        np.testing.assert_allclose(
            share.requests.kv_block_seconds, [call.block_seconds for call in mine]
        )


counts = st.integers(2, 4)


@settings(max_examples=120, deadline=None)
@given(workloads(), served_by, counts, routers)
def test_engines_that_jump_over_equal_steps_change_nothing(workload, served, count, router):
    engine, policy = served
    assert_like_twin(workload, policy, engine, count, router)


@settings(max_examples=120, deadline=None)
@given(with_graphs(), engines_that_keep(), st.sampled_from(POLICIES), counts, routers)
def test_the_same_where_they_keep_kv(workload, engine, policy, count, router):
    assert_like_twin(workload, policy, engine, count, router)


@pytest.mark.parametrize(
    ("policy", "scheduling"),
    [
        (FCFS(), "by_rank"),
        (VTC(10.0), "by_rank"),
        (Gittins(), "running_first"),
        (VTC(10.0), "running_first"),
    ],
    ids=repr,
)
def test_crowded_engines_are_jumped_over_rightly(policy, scheduling):
    """Applications of Hermes with costs of their own, wide batches, and too few blocks."""
    workload = poisson_workload(hermes_applications(), load=100.0, jobs=28, seed=3)
    engine = Engine(24, 512, 640, kv_seconds_per_token=1e-7, scheduling=scheduling)
    given = workload, policy, engine
    result = simulate_cluster(*given, 2, LeastLoaded(), cost=CostModel())
    twin = step_by_step(*given, CostModel(), engines=2, router=LeastLoaded())
    np.testing.assert_allclose(result.completion_times, twin.completion_times, rtol=1e-9)
    for share, theirs in zip(result.engines, twin.servers, strict=True):
        for name in ("units", "steps", "preemptions", "prefilled_again", "peak_blocks"):
            assert getattr(share, name) == getattr(theirs, name), name
        assert share.peak_blocks > 600  # they do run out
    assert result.moves == twin.moves > 0


@dataclass(frozen=True)
class Sequential(Router):
    """Goes to the engines named, unit by unit."""

    numbers: tuple

    def new_state(self, engines):
        return iter(self.numbers)

    def choose(self, unit, engines, state):
        return next(state)


@settings(max_examples=40, deadline=None)
@given(workloads(), like_vllm_and_policies)
def test_of_several_engines_one_that_serves_all_is_that_engine(workload, served):
    """Its steps end where something comes in, not at all that happens outside."""
    engine, policy = served
    one = simulate_engine(workload, policy, engine, cost=WHOLE_COST)
    router = Sequential((1,) * 100)
    cluster = simulate_cluster(workload, policy, engine, 3, router, cost=WHOLE_COST)
    np.testing.assert_array_equal(cluster.completion_times, one.completion_times)
    assert (cluster.steps, cluster.preemptions) == (one.steps, one.preemptions)
    assert [share.steps for share in cluster.engines] == [0, one.steps, 0]
    assert cluster.engines[1].decisions <= one.decisions


@pytest.mark.parametrize("retention", [None, LRU(), KeepAll(), NextUse(5.0)], ids=repr)
def test_one_engine_is_that_engine_with_users_backends_and_an_estimator(retention):
    applications = hermes_applications(100)
    jobs = poisson_workload(applications, load=40, jobs=30, seed=1)
    users = closed_loop(applications, users=15, think_seconds=5.0, jobs=30, seed=2)
    pools = {"container": Pool.containers(4, 5.0), "llm": Pool.adapters(3, 2.0)}
    engine = Engine(8, blocks=1500, retention=retention)
    for workload in (jobs, users):
        graphs = (workload.jobs if workload is users else workload).graphs
        assert_same_as_one_engine(
            workload, Gittins(), engine, LeastLoaded("waiting"), backends=pools,
            prewarm=AlwaysAtStart(), estimator=DemandEstimator(graphs), seed=3,
        )  # fmt: skip


def test_every_token_is_produced_once_wherever_it_is():
    workload = poisson_workload(hermes_applications(100), load=60, jobs=60, seed=2)
    expected = sum(
        made * count
        for run in workload.runs
        for execution in run
        if execution.unit.kind == "llm"
        for count, _, made in call_groups(execution)
    )
    for router in ROUTERS:
        result = simulate_cluster(workload, Gittins(), Engine(16, blocks=1500), 3, router)
        assert sum(share.requests.tokens.sum() for share in result.engines) == expected
        assert result.summary()["prefilled_again"] > 0


def test_an_engine_forgets_a_job_that_goes_on_elsewhere():
    """It is over with its prefill on engine 1, and runs on engine 0 when that forms a batch."""
    runs = [
        [Execution(THINK, 4, 1), Execution(THINK, 4, 5)],
        [Execution(CODE, 2, 5)],
    ]
    workload = Workload([0, 0], [1, 1], "aa", {"a": Distribution([1.0])}, runs=runs)
    for scheduling in ("by_rank", "running_first"):
        engine = Engine.counting_steps(4, preemption="none", scheduling=scheduling)
        result = simulate_cluster(workload, FCFS(), engine, 2, Sequential((1, 1, 0)))
        assert result.completion_times.tolist() == [1 + 5, 5]
        assert [share.mean_batch for share in result.engines] == [1.0, (2 + 4) / 5]


def one_run(*shared, tokens=8):
    """A run of calls of 8 tokens and more, each of one unit, with what each shares."""
    calls = [
        Execution(THINK, tokens + 2 * at, 1, shared_tokens=each) for at, each in enumerate(shared)
    ]
    return Workload([0.0], [1.0], "a", {"a": Distribution([1.0])}, runs=[calls])


def keeping(retention, blocks=100):
    return Engine(4, 100, blocks, 2, "none", 1.0, 0.0, 0.0, retention=retention)


@pytest.mark.parametrize(
    ("numbers", "found"),
    [
        ((0, 0, 0), [0, 8, 6]),
        ((0, 1, 0), [0, 0, 6]),  # as far as both calls since have shared
        ((0, 1, 1), [0, 0, 6]),
        ((0, 1, 2), [0, 0, 0]),
    ],
)
def test_what_a_run_left_is_found_where_it_was_left(numbers, found):
    """Of the first call's 8 tokens; the last call shares 6 with the one before."""
    workload = one_run(0, 8, 6)
    result = simulate_cluster(workload, FCFS(), keeping(LRU()), 3, Sequential(numbers))
    assert result.prefixes[:3] == (8 + 10 + 12, sum(found), 8 + 6)
    for number, share in enumerate(result.engines):
        served = [at for at, each in enumerate(numbers) if each == number]
        assert share.units == len(served)
        assert share.prefixes.found == sum(found[at] for at in served)
    assert result.moves == sum(a != b for a, b in itertools.pairwise(numbers))


def test_what_calls_elsewhere_did_not_share_is_not_found_later():
    workload = one_run(0, 2, 10)
    result = simulate_cluster(workload, FCFS(), keeping(LRU()), 2, Sequential((0, 1, 0)))
    assert result.prefixes.found == 2


def test_what_is_held_for_a_run_that_went_elsewhere_serves_others():
    """Of ten blocks four are held while a tool works, so that a prompt waits for a decoding call.

    It need not where the run has its next call on another engine.
    """
    engine = keeping(KeepAll(1.0), 10)
    others = [Execution(CODE, 2, 9)], [Execution(CODE, 10, 1)]
    waits, passes = (
        simulate_cluster(
            Workload(
                [0.0, 0.0, 5.0], [1.0] * 3, "abb", {n: Distribution([1.0]) for n in "ab"},
                runs=[[Execution(THINK, 8, 1), then], *others],
            ),
            FCFS(), engine, 2, Sequential(numbers),
        )
        for then, numbers in (
            (Execution(TOOL, seconds=20.0), (0, 0, 0)),
            (Execution(THINK, 9, 11, shared_tokens=8), (0, 0, 1, 0)),
        )
    )  # fmt: skip
    assert waits.completion_times.tolist() == [21, 9, (9 - 5) + 1]
    assert passes.completion_times.tolist() == [1 + 11, 9, 1]
    assert waits.engines[0].prefixes.held_block_seconds == 4 * (10 - 1)
    assert passes.engines[0].prefixes.held_block_seconds == 0


@dataclass
class Seen:
    number: int
    requests: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    kv_share: float = 0.0
    found: int = 0

    def found_tokens(self, unit):
        return self.found


def ready(known=(10.0,), attained=0.0, last=None, index=0):
    job = Job(index, "a", 0.0, Distribution(known), attained_service=attained)
    return ReadyUnit(job, Execution(THINK, 20, 5), 1.0, 1, 20, last)


def test_the_least_loaded_is_by_what_is_asked():
    seen = [Seen(0, 5, 4, 10, 0.5), Seen(1, 4, 5, 20, 0.2), Seen(2, 9, 4, 5, 0.2)]
    chosen = {by: LeastLoaded(by).choose(ready(), seen, None) for by in LOADS}
    assert chosen == {"requests": 1, "waiting": 0, "prompt_tokens": 2, "kv_share": 1}


def test_affinity_holds_up_to_the_bound():
    seen = [Seen(0, 5), Seen(1, 9, found=16), Seen(2, 4, found=8)]
    assert PrefixAffinity(5.0).choose(ready(last=1), seen, None) == 1
    assert PrefixAffinity(4.0).choose(ready(last=1), seen, None) == 2
    seen[2].found = 16
    assert PrefixAffinity(9.0).choose(ready(last=2), seen, None) == 2
    assert PrefixAffinity(9.0).choose(ready(last=0), seen, None) == 1  # the first of equals
    for engine in seen:
        engine.found = 0
    assert PrefixAffinity(9.0).choose(ready(last=1), seen, None) == 2


def test_expected_demand_is_what_is_left_of_it_by_now():
    seen, router = [Seen(0), Seen(1)], ExpectedDemand(bound=5.0)
    state = router.new_state(2)
    assert router.choose(ready((10.0, 30.0), index=0), seen, state) == 0
    assert router.choose(ready((8.0,), index=1), seen, state) == 1
    assert router.choose(ready((9.0,), index=2), seen, state) == 1
    assert state == [{0: 20.0}, {1: 8.0, 2: 9.0}]
    third = ready((10.0, 30.0), attained=12.0, last=0, index=0)
    assert router.choose(third, seen, state) == 0  # 18 s are left of it, and 17 s there
    assert state[0] == {0: 18.0}
    router.choose(ready((6.0,), index=3), seen, state)
    assert state[1] == {1: 8.0, 2: 9.0, 3: 6.0}
    # Job 2 has 14 s on its engine besides its own, and 18 s on the other.
    assert router.choose(ready((9.0,), last=1, index=2), seen, state) == 1
    router.departed(third.job, state)
    assert router.choose(ready((9.0,), last=1, index=2), seen, state) == 0
    assert ExpectedDemand().choose(ready((9.0,), last=1, index=1), seen, state) == 1


def test_weighted_scores_add_up():
    seen = [Seen(0, waiting=4, kv_share=0.5, found=20), Seen(1, waiting=0, kv_share=0.25)]
    assert WeightedScores(1.0, 0.0, 0.0).choose(ready(), seen, None) == 0
    assert WeightedScores(1.0, 1.0, 0.0).choose(ready(), seen, None) == 0  # a tie: the first
    assert WeightedScores(1.0, 1.0, 0.1).choose(ready(), seen, None) == 1
    seen[1].waiting = 4
    assert WeightedScores(0.0, 3.0, 1.0).choose(ready(), seen, None) == 1


def test_a_random_router_draws_by_its_seed():
    workload = poisson_workload(hermes_applications(50), load=40, jobs=60, seed=2)
    draws = [simulate_cluster(workload, FCFS(), None, 4, RandomEngine(seed)) for seed in (0, 0, 1)]
    first, again, other = ([share.units for share in result.engines] for result in draws)
    assert first == again != other
    assert min(first) > 0.7 * max(first)


def test_four_engines_find_again_what_the_router_keeps_together():
    """A law of the mechanism: affinity finds at least what a random router does."""
    runs = [
        [Execution(THINK, 20 + 10 * at, 10, shared_tokens=20 + 10 * at - 10 if at else 0)
         for at in range(6)]
        for _ in range(12)
    ]  # fmt: skip
    workload = Workload(
        np.arange(12.0), [1.0] * 12, ["a"] * 12, {"a": Distribution([1.0])}, runs=runs
    )
    engine = Engine(4, 64, 200, 4, "none", retention=LRU())
    affine, random = (
        simulate_cluster(workload, FCFS(), engine, 4, router)
        for router in (PrefixAffinity(np.inf), RandomEngine())
    )
    assert affine.prefixes.found == affine.prefixes.findable > random.prefixes.found
    assert affine.moves == 0


def test_a_result_says_what_each_engine_did(capsys):
    workload = poisson_workload(hermes_applications(50), load=40, jobs=40, seed=2)
    result = simulate_cluster(workload, Gittins(), Engine(16), 2, progress=True)
    assert "jobs" in capsys.readouterr().err
    total, *each = result.table
    assert [row["engine"] for row in each] == [0, 1]
    for name in ("units", "requests", "preemptions", "prefilled_again"):
        assert total[name] == sum(row[name] for row in each)
    assert total["requests"] == result.ttft.size
    busy = [share.busy_seconds for share in result.engines]
    assert result.imbalance == pytest.approx(max(busy) / np.mean(busy))
    summary = result.summary()
    assert summary["moves"] == result.moves
    assert summary["p95_ttft_seconds"] == np.quantile(result.ttft, 0.95)
    assert summary["steps"] == sum(share.steps for share in result.engines)
    assert "2 engines by LeastLoaded(by='requests'), 40 jobs" in repr(result)
    assert "found again" not in repr(result)


def test_bad_input_is_refused():
    workload = one_run(0)
    for engines in (0, -1, 2.5, "four"):
        with pytest.raises(DemandError, match=r"engines is .*at least 1: give engines=4"):
            simulate_cluster(workload, FCFS(), None, engines)
    with pytest.raises(DemandError, match=r"router is the class LeastLoaded; .*make one"):
        simulate_cluster(workload, FCFS(), None, 2, LeastLoaded)
    with pytest.raises(DemandError, match="router is 'random'"):
        simulate_cluster(workload, FCFS(), None, 2, "random")
    for number in (2, -1, 0.5, None, "0"):
        with pytest.raises(DemandError, match=r"chose engine .* of job 0; .* from 0 to 1: have"):
            simulate_cluster(workload, FCFS(), None, 2, Sequential((number,)))
    assert simulate_cluster(workload, FCFS(), None, 2, Sequential((np.int64(1),))).moves == 0
    with pytest.raises(DemandError, match="has no runs"):
        simulate_cluster(replace(workload, runs=None), FCFS())
    apart = [replace(execution, after=()) for execution in workload.runs[0]] * 2
    with pytest.raises(DemandError, match=r"job 0 has units side by side .*one engine at a time"):
        simulate_cluster(replace(workload, runs=[apart]), FCFS())
    with pytest.raises(DemandError, match="by is 'load'; expected one of requests"):
        LeastLoaded("load")
    with pytest.raises(DemandError, match="by is 'load'"):
        PrefixAffinity(1.0, "load")
    for router in (PrefixAffinity, ExpectedDemand):
        for bound in (-1.0, float("nan")):
            with pytest.raises(DemandError, match=r"bound is .* at least 0"):
                router(bound)
    with pytest.raises(DemandError, match="seed is -1"):
        RandomEngine(-1)
    with pytest.raises(DemandError, match=r"queue is -1\.0; expected a finite weight"):
        WeightedScores(queue=-1.0)
    with pytest.raises(DemandError, match="all 0, so that all engines score alike"):
        WeightedScores(0.0, 0.0, 0.0)
