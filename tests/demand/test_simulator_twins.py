"""The simulator against the slow one that looks at every job every second."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import Distribution, simulate
from tests.demand.policy_zoo import POLICIES, closed_loops, whole_second_workloads
from tests.demand.twins import second_by_second

by_name = pytest.mark.parametrize("policy", POLICIES, ids=str)


def refine(application, progress):
    """What is left depends on how many units there were, and on the last."""
    last = progress.executed[-1].seconds
    return Distribution([1 + last, 2 + len(progress.executed), 9])


def assert_as_the_twin(workload, policy, servers, refine=None):
    expected, preemptions = second_by_second(workload, policy, servers, refine)
    result = simulate(workload, policy, servers, refine=refine)
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
