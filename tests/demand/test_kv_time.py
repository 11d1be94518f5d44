"""The cost of Justitia: KV held over time, and fair sharing of it."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from demand import DemandError, Distribution, Execution, Job, Unit, VirtualTime, Workload, simulate
from demand.policies import FCFS, kv_time
from demand.simulation.engine import Engine, simulate_engine
from tests.demand.policy_zoo import whole_second_workloads
from tests.demand.twins import processor_sharing

WRITE, TEST = Unit("write", "llm"), Unit("test", "tool")


@st.composite
def executions(draw):
    if draw(st.booleans()) and draw(st.booleans()):
        return Execution(TEST, seconds=3.0)
    calls, made = draw(st.integers(1, 4)), draw(st.integers(1, 20))
    given_tokens = draw(st.integers(1, 30))
    if calls == 1 or draw(st.booleans()):
        return Execution(WRITE, given_tokens, made, calls)
    longest = draw(st.integers(made, made + 15))
    mean = (longest + (calls - 1) * made) / calls
    return Execution(WRITE, given_tokens, mean, calls, longest_output_tokens=longest)


@given(st.lists(executions(), min_size=1, max_size=4))
def test_it_is_what_a_run_holds_on_an_engine_of_its_own(run):
    """Blocks of one token, steps of a second: KV-seconds are token-steps."""
    workload = Workload([0.0], [1.0], "a", {"a": Distribution([1.0])}, runs=[run])
    engine = Engine.counting_steps(8, block_tokens=1)
    held = simulate_engine(workload, FCFS(), engine).kv_block_seconds
    assert kv_time(run) == pytest.approx(held)


def test_by_hand():
    assert kv_time([Execution(WRITE, 10, 3)]) == 10 + 11 + 12
    assert kv_time([Execution(WRITE, 10, 3, 2), Execution(TEST, seconds=9.0)]) == 2 * 33
    assert kv_time([Execution(WRITE, 10, 2, 2, longest_output_tokens=3)]) == 33 + 10
    with pytest.raises(DemandError, match="run"):
        kv_time([1.0])


@settings(max_examples=60, deadline=None)
@given(workload=whole_second_workloads(max_jobs=9), unit=st.sampled_from([1.0, 64.0]))
def test_ranks_are_in_the_order_in_which_equal_shares_would_finish(workload, unit):
    """The twin shares second by second; costs of a unit shared `unit` a second are seconds."""
    n = len(workload)
    seconds = [1.0 + 3 * (i % 4) for i in range(n)]
    names = [str(i) for i in range(n)]
    jobs = Workload(workload.arrivals, seconds, names, {x: Distribution([99.0]) for x in names})
    policy = VirtualTime(unit, dict(zip(names, np.array(seconds) * unit, strict=True)))
    state = policy.new_state()
    ranks = []
    for i, name in enumerate(names):
        job = Job(i, name, float(jobs.arrivals[i]), Distribution([99.0]))
        job.state = state
        policy.arrived(job, job.arrival)
        ranks.append(policy.rank(job, job.arrival))
    shared = jobs.arrivals + processor_sharing(jobs)
    for i in range(n):
        for j in range(n):
            if shared[i] < shared[j] - 1e-6:
                assert ranks[i] < ranks[j]


@settings(max_examples=40, deadline=None)
@given(workload=whole_second_workloads())
def test_costs_that_are_the_mean_seconds_change_nothing(workload):
    means = {name: known.mean() for name, known in workload.distributions.items()}
    assume(all(mean > 0.0 for mean in means.values()))
    plain = simulate(workload, VirtualTime())
    told = simulate(workload, VirtualTime(1.0, means))
    assert told.completion_times.tolist() == plain.completion_times.tolist()


def test_costs_are_configuration():
    policy = VirtualTime(2.0, {"b": 3, "a": 1.5})
    assert policy.costs == (("a", 1.5), ("b", 3.0))
    assert policy == replace(policy) == pickle.loads(pickle.dumps(policy))
    assert len({policy, replace(policy)}) == 1
    with pytest.raises(DemandError, match=r"cost of 'a' is .*; expected a positive"):
        VirtualTime(costs={"a": 0})
    with pytest.raises(DemandError, match="costs is 3; expected a mapping"):
        VirtualTime(costs=3)
    job = Job(0, "x", 0.0, Distribution([1.0]))
    job.state = policy.new_state()
    with pytest.raises(DemandError, match="application 'x' has no cost, only a, b"):
        policy.arrived(job, 0.0)
