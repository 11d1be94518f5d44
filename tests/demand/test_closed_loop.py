"""Users who wait for their jobs: by hand, and against mean value analysis."""

import numpy as np
import pytest

from demand import FCFS, Application, DemandError, Distribution, Gittins, Workload, simulate
from demand.workloads.closed_loop import ClosedLoop, closed_loop

KNOWN = {"a": Distribution([2.0]), "b": Distribution([1.0])}
MIX = [
    Application("a", Distribution([1.0, 9.0])),
    Application("b", Distribution([2.0]), weight=2.0),
]


def test_by_hand():
    """User 0 thinks for 1 s between two jobs of 2 s; user 1 submits once, at 1 s."""
    jobs = Workload([0.0, 1.0, 1.0], [2.0, 1.0, 2.0], "aba", KNOWN, deadlines=[3.0, 9.0, 5.0])
    loop = ClosedLoop(jobs, [0, 1, 0], [0.0, 0.0, 1.0])
    result = simulate(loop, FCFS())
    # 0-2 the first, 2-3 that of user 1, 3-5 the second of user 0, submitted at 3.
    assert result.workload.arrivals.tolist() == [0.0, 1.0, 3.0]
    assert result.completion_times.tolist() == [2.0, 2.0, 2.0]
    assert result.workload.deadlines.tolist() == [3.0, 9.0, 7.0]  # 4 s after it arrives
    assert result.deadline_hits == 1.0


def test_the_result_has_the_jobs_as_they_arrived():
    """User 1, who is quick, submits both jobs before the second of user 0."""
    jobs = Workload([0.0, 0.0, 0.0, 0.0], [9.0, 1.0, 3.0, 2.0], "abab", KNOWN, tenants="wxyz")
    loop = ClosedLoop(jobs, [0, 1, 0, 1], [0.0, 0.0, 0.0, 1.0])
    result = simulate(loop, FCFS(), servers=2)
    assert result.workload.tenants == ("w", "x", "z", "y")
    assert result.workload.demands.tolist() == [9.0, 1.0, 2.0, 3.0]
    assert result.workload.arrivals.tolist() == [0.0, 0.0, 2.0, 9.0]
    assert result.completion_times.tolist() == [9.0, 1.0, 2.0, 3.0]


def test_every_policy_sees_the_same_jobs_of_every_user():
    loop = closed_loop(MIX, users=5, think_seconds=3.0, jobs=200, seed=2)
    plain, gittins = simulate(loop, FCFS()), simulate(loop, Gittins())
    assert sorted(plain.workload.demands) == sorted(gittins.workload.demands)
    assert plain.workload.demands.tolist() != gittins.workload.demands.tolist()
    again = closed_loop(MIX, users=5, think_seconds=3.0, jobs=200, seed=2)
    np.testing.assert_array_equal(loop.think_seconds, again.think_seconds)
    assert gittins.mean < plain.mean
    for result in (plain, gittins):
        present = result.workload.arrivals[:, None] <= result.workload.arrivals
        gone = (result.workload.arrivals + result.completion_times)[:, None] <= (
            result.workload.arrivals
        )
        assert (present & ~gone).sum(axis=0).max() <= 5


@pytest.mark.parametrize("users", [1, 3, 8])
def test_exponential_users_are_mean_value_analysis(users):
    """R(n) = S (1 + Q(n - 1)), X(n) = n / (R(n) + Z), Q(n) = X(n) R(n), for one server."""
    think, queue = 4.0, 0.0
    for n in range(1, users + 1):
        response = 1.0 + queue
        queue = n / (response + think) * response
    exponential = Application(
        "e", Distribution([1.0]), sample=lambda rng, n: rng.exponential(size=n), mean_seconds=1.0
    )
    means = [
        simulate(closed_loop([exponential], users, think, 4000, seed), FCFS()).mean
        for seed in range(20)
    ]
    half = 3.0 * np.std(means, ddof=1) / np.sqrt(len(means))
    assert abs(np.mean(means) - response) < half < 0.05 * response


def test_bad_input_is_refused():
    jobs = Workload([0.0, 0.0], [1.0, 1.0], "ab", KNOWN)
    with pytest.raises(DemandError, match="expected one of each per job"):
        ClosedLoop(jobs, [0], [0.0, 0.0])
    with pytest.raises(DemandError, match="think_seconds has a negative"):
        ClosedLoop(jobs, [0, 0], [0.0, -1.0])
    with pytest.raises(DemandError, match="users is 3 for 2 jobs"):
        closed_loop(MIX, users=3, think_seconds=1.0, jobs=2)
    with pytest.raises(DemandError, match="think_seconds is nan"):
        closed_loop(MIX, users=1, think_seconds=float("nan"), jobs=2)
