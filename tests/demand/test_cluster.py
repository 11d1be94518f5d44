"""Several engines behind a router, against the single engine, a twin, and by hand."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import (
    CostModel,
    Unit,
    simulate_cluster,
    simulate_engine,
)
from demand.routing import (
    ExpectedDemand,
    LeastLoaded,
    PrefixAffinity,
    RandomEngine,
    Router,
    WeightedScores,
)
from tests.demand.engine_twin import step_by_step
from tests.demand.test_engine import (
    POLICIES,
    WHOLE_COST,
    engines_and_policies,
    like_vllm_and_policies,
    workloads,
)
from tests.demand.test_engine_prefixes import engines_that_keep, with_graphs

THINK, TOOL = Unit("think", "llm"), Unit("tool", "tool")


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
    assert_same_as_one_engine(workload, policy, engine, router, service_cost=cost)


@settings(max_examples=60, deadline=None)
@given(with_graphs(), engines_that_keep(), st.sampled_from(POLICIES), routers)
def test_so_it_is_where_it_keeps_kv(workload, engine, policy, router):
    engine = replace(engine, decode_seconds_per_request=0.1, kv_seconds_per_token=1e-3)
    assert_same_as_one_engine(workload, policy, engine, router)


def assert_like_twin(workload, policy, engine, count, router):
    cluster = simulate_cluster(workload, policy, engine, count, router, service_cost=WHOLE_COST)
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
