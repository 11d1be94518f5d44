"""The simulator against the slow one that looks at every job every second."""

from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import Distribution, Policy, Workload, simulate
from demand.simulation.queue.servers import Servers
from tests.demand.policy_zoo import POLICIES, Shy, closed_loops, whole_second_workloads
from tests.demand.twins import second_by_second

by_name = pytest.mark.parametrize("policy", POLICIES, ids=str)


def refine(application, progress):
    """What is left depends on how many units there were, and on the last."""
    last = progress.executed[-1].seconds
    return Distribution([1 + last, 2 + len(progress.executed), 9])


def assert_as_the_twin(workload, policy, servers, refine=None):
    expected, preemptions = second_by_second(workload, policy, servers, refine)
    result = simulate(workload, policy, servers, estimator=refine)
    np.testing.assert_allclose(result.completion_times, expected, rtol=0, atol=1e-9)
    assert result.preemptions == preemptions


@by_name
@settings(max_examples=15, deadline=None)
@given(workload=whole_second_workloads(), servers=st.integers(1, 5))
def test_every_policy_on_odd_workloads(policy, workload, servers):
    if "VTC" in str(policy):
        servers = 1  # counters of tenants on two servers leave the grid
    assert_as_the_twin(workload, policy, servers)


@by_name
@settings(max_examples=8, deadline=None)
@given(workload=whole_second_workloads(), servers=st.integers(1, 5))
def test_every_policy_refined_at_the_end_of_every_unit(policy, workload, servers):
    assert_as_the_twin(workload, policy, 1 if "VTC" in str(policy) else servers, refine)


@by_name
@settings(max_examples=8, deadline=None)
@given(loop=closed_loops(), servers=st.integers(1, 2))
def test_every_policy_in_a_closed_loop(policy, loop, servers):
    assert_as_the_twin(loop, policy, 1 if "VTC" in str(policy) else servers)


def ranking_everyone(workload, policy, servers):
    with mock.patch("demand.simulation.queue.simulate.servers_for", Servers):
        return simulate(workload, policy, servers)


def test_bounds_do_not_hide_a_rank_that_being_served_makes_worse():
    """One with a rank beyond the best that waits has no bound below it."""
    workload = Workload([2, 2, 2, 3, 5], [5, 2, 5, 4, 2], ["a"] * 5, {"a": Distribution([1.0])})
    result, expected = simulate(workload, Shy(), 3), ranking_everyone(workload, Shy(), 3)
    assert result.completion_times.tolist() == expected.completion_times.tolist()
    assert result.preemptions == expected.preemptions == 6


@settings(max_examples=60, deadline=None)
@given(workload=whole_second_workloads(max_jobs=16), servers=st.integers(2, 5))
def test_bounds_change_nothing_where_being_served_makes_ranks_worse(workload, servers):
    result, expected = (
        simulate(workload, Shy(), servers),
        ranking_everyone(workload, Shy(), servers),
    )
    assert result.completion_times.tolist() == expected.completion_times.tolist()
    assert result.preemptions == expected.preemptions


@dataclass(frozen=True)
class ByPriority(Policy):
    """Ranks by whole numbers, which may be too large for a float."""

    def rank(self, job, now):
        return job.priority


def test_bounds_are_not_rounded_below_a_rank_that_no_float_is():
    large = 1_700_000_000_000_000_000
    workload = Workload(
        [0, 0, 1, 2],
        [10, 10, 10, 1],
        ["a"] * 4,
        {"a": Distribution([1.0])},
        priorities=[large + 1, large - 1000, large + 3, large],
    )
    result = simulate(workload, ByPriority(), 2)
    assert result.completion_times.tolist() == [11, 10, 19, 1]
    assert result.preemptions == 1
