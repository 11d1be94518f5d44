"""Policies that rank by attained service, forgotten with time or in queues: by hand."""

import math

import numpy as np
import pytest

from demand import LAS, MLFQ, DecayingLAS, DemandError, Distribution, Job, Workload, simulate

KNOWN = {"a": Distribution([9.0])}


def served(policy, arrivals, demands, **settings):
    workload = Workload(arrivals, demands, ["a"] * len(arrivals), KNOWN)
    return simulate(workload, policy, **settings)


def job(policy, index=0, arrival=0.0, state=None):
    one = Job(index, "a", arrival, KNOWN["a"])
    one.state = policy.new_state() if state is None else state
    policy.arrived(one, arrival)
    return one


def attain(policy, one, seconds, now):
    one.attained_service += seconds
    policy.served(one, seconds, now)


def test_half_of_the_service_is_forgotten_every_half_life():
    """The rank is when what is left will be a second: 8 s at second 10 are 1 s three later."""
    policy = DecayingLAS(half_life_seconds=5.0, quantum=8.0)
    one = job(policy)
    assert policy.rank(one, 0.0) == -math.inf
    attain(policy, one, 8.0, 10.0)
    assert policy.rank(one, 10.0) == policy.rank(one, 99.0) == 10.0 + 5.0 * 3.0
    attain(policy, one, 8.0, 15.0)  # 4 s are left, and 8 are added
    assert policy.rank(one, 15.0) == pytest.approx(15.0 + 5.0 * math.log2(12.0))
    attain(policy, one, 7.9, 23.0)
    assert policy.rank(one, 23.0) == pytest.approx(15.0 + 5.0 * math.log2(12.0))


def test_one_who_waited_comes_before_one_served_since_though_it_attained_more():
    policy, las = DecayingLAS(half_life_seconds=2.0, quantum=1.0), LAS(1.0)
    state = policy.new_state()
    old, young = job(policy, 0, state=state), job(policy, 1, 20.0, state)
    attain(policy, old, 10.0, 10.0)
    attain(policy, young, 3.0, 23.0)
    assert policy.rank(old, 23.0) < policy.rank(young, 23.0)
    assert las.rank(old, 23.0) > las.rank(young, 23.0)


def test_many_quanta_at_once_are_those_one_by_one():
    policy = DecayingLAS(half_life_seconds=30.0, quantum=0.01)
    whole, pieces = job(policy), job(policy)
    attain(policy, whole, 20.0, 20.0)
    for at in range(1, 201):
        attain(policy, pieces, 0.1, at / 10)
    assert policy.rank(whole, 20.0) == pytest.approx(policy.rank(pieces, 20.0))


def test_without_forgetting_it_is_least_attained_service():
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.integers(0, 9, 60)).astype(float)
    demands = rng.integers(1, 9, 60).astype(float)
    never = DecayingLAS(half_life_seconds=1e9, quantum=1.0)
    expected = served(LAS(1.0), arrivals, demands).completion_times
    assert served(never, arrivals, demands).completion_times == pytest.approx(expected)


def test_a_long_job_comes_before_shorter_ones_that_were_served_since():
    """Newcomers still go first, with what they have not attained yet."""
    arrivals, demands = [0.0, *np.arange(1.0, 400.0, 2.0)], [20.0, *[1.95] * 200]
    policies = LAS(0.5), DecayingLAS(5.0, 0.5)
    las, decaying = (served(p, arrivals, demands).completion_times[0] for p in policies)
    assert decaying < 0.8 * las


def test_queues_of_growing_quanta():
    """1 s, 2 s, then to the end; who has had its quantum goes behind those who have not."""
    result = served(MLFQ(1.0, 2.0, 3), [0.0, 0.0, 0.5], [5.0, 2.0, 1.0])
    # 0: 0 to 1; 1: to 2; 2: to 3, over; 0 in the second queue: to 5; 1: to 6, over; 0: to 8.
    assert result.completion_times.tolist() == [8.0, 6.0, 2.5]


def test_one_queue_is_first_come_first_served():
    result = served(MLFQ(queues=1, starvation_seconds=3.0), [0.0, 1.0], [5.0, 1.0])
    assert result.completion_times.tolist() == [5.0, 5.0]


def test_who_starves_is_promoted_at_that_very_second():
    arrivals, demands = [0.0, *np.arange(1.0, 30.0)], [3.0, *[1.0] * 29]
    never, soon = (
        served(MLFQ(1.0, 2.0, 4, seconds), arrivals, demands).completion_times[0]
        for seconds in (math.inf, 4.5)
    )
    assert never == 32.0
    # It is served in its first second, and promoted at 5.5, before those who come at 6: it gets a
    # second from 6 on, is promoted again at 11.5, and goes behind the one that came at 11.
    assert soon == 14.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DecayingLAS(0.0), "half_life_seconds is 0"),
        (lambda: DecayingLAS(quantum=math.inf), "quantum is inf"),
        (lambda: MLFQ(quantum=-1.0), "quantum is -1"),
        (lambda: MLFQ(ratio=0.5), "ratio is 0.5; expected at least 1"),
        (lambda: MLFQ(queues=0), "queues is 0"),
        (lambda: MLFQ(starvation_seconds=0.0), "starvation_seconds is 0"),
        (lambda: MLFQ().rank(Job(0, "a", 0.0, KNOWN["a"]), 0.0), "stands in no queue"),
        (lambda: DecayingLAS().rank(Job(0, "a", 0.0, KNOWN["a"]), 0.0), "no decayed service"),
    ],
)
def test_what_makes_no_sense_is_refused(make, said):
    with pytest.raises(DemandError, match=said):
        make()
