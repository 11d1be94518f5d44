"""Jobs in the hands of an engine: what a job may be, and that a refused one leaves nothing."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from demand import MLFQ, DemandError, Distribution, Job, Policy, RequestFCFS, VirtualTime
from demand.integrations.job_ledger import JobLedger

KNOWN = {"short": Distribution([2.0, 3.0])}


@dataclass
class Counting:
    """State of `Breaks`."""

    present: int = 0


@dataclass(frozen=True)
class Breaks(Policy):
    """Fails as a policy of a user may: with an error that is not ours."""

    def new_state(self) -> Counting:
        return Counting()

    def arrived(self, job: Job, now: float) -> None:
        job.state.present += 1

    def departed(self, job: Job, now: float) -> None:
        job.state.present -= 1

    def rank(self, job: Job, now: float) -> float:
        if job.priority:
            raise RuntimeError("the policy broke")
        return 0.0


def test_a_job_that_cannot_be_ranked_departs() -> None:
    ledger = JobLedger(Breaks(), KNOWN)
    with pytest.raises(RuntimeError, match="the policy broke"):
        ledger.open("short", 0.0, priority=1)
    job = ledger.open("short", 0.0)
    assert (job.index, job.state.present) == (0, 1)


@dataclass(frozen=True)
class Unordered(Policy):
    """Ranks NaN, alone or within a class."""

    within: bool

    def rank(self, job: Job, now: float) -> float | tuple[float, ...]:
        return (0.0, math.nan) if self.within else math.nan


@pytest.mark.parametrize("within", [False, True])
def test_a_rank_of_nan_is_refused_with_the_job(within: bool) -> None:
    ledger = JobLedger(Unordered(within), KNOWN)
    with pytest.raises(DemandError, match=r"Unordered\(.*\) ranked job 0 NaN"):
        ledger.open("short", 0.0)


@dataclass(frozen=True)
class Gives(Policy):
    """Gives one rank to all jobs, whatever it is."""

    given: Any

    def rank(self, job: Job, now: float) -> Any:
        return self.given


NO_RANKS = [None, "first", b"1", [1.0], {}, (1.0, None), ("a", 2.0), 1j, np.timedelta64(1, "s")]


@pytest.mark.parametrize("given", NO_RANKS, ids=repr)
def test_a_rank_that_is_no_number_is_refused_by_the_policys_name(given: Any) -> None:
    ledger = JobLedger(Gives(given), KNOWN)
    with pytest.raises(DemandError, match=r"Gives\(.*\) ranked job 0 .*; expected a number or"):
        ledger.open("short", 0.0)


@pytest.mark.parametrize("given", [0, 1.5, True, np.float32(2), np.int64(3), (1, 2.0), math.inf])
def test_a_rank_is_a_number_of_any_kind_or_a_tuple_of_them(given: Any) -> None:
    ledger = JobLedger(Gives(given), KNOWN)
    assert ledger.rank(ledger.open("short", 0.0), 1.0) == given


@pytest.mark.parametrize("policy", ["fcfs", None, VirtualTime])
def test_a_policy_is_one(policy: Any) -> None:
    with pytest.raises(DemandError, match=r"policy is .*; expected a policy, such as Gittins"):
        JobLedger(policy, KNOWN)


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"weight": math.inf}, "weight of a job is inf; expected a positive finite number"),
        ({"weight": "2"}, "weight of a job holds text"),
        ({"weight": math.nan}, "weight of a job is nan"),
        ({"deadline_seconds": "5"}, "deadline_seconds of a job holds text"),
        ({"priority": "x"}, "priority of a job holds text"),
        ({"priority": math.nan}, "priority of a job is nan"),
        ({"demand_seconds": "9"}, "demand_seconds of a job holds text"),
        ({"demand_seconds": -5.0}, r"demand_seconds of a job is -5\.0"),
        ({"tenant": ["x"]}, r"tenant of a job is \['x'\]; expected a string"),
    ],
)
def test_jobs_that_make_no_sense_do_not_disturb_the_others(
    known: dict[str, Any], said: str
) -> None:
    ledger = JobLedger(VirtualTime(), KNOWN)
    with pytest.raises(DemandError, match=said):
        ledger.open("short", 0.0, **known)
    job = ledger.open("short", 1.0)
    assert job.index == 0
    assert math.isfinite(VirtualTime().rank(job, 2.0))


def test_an_application_is_a_string() -> None:
    with pytest.raises(DemandError, match="application of a job is None; expected a string"):
        JobLedger(VirtualTime(), KNOWN).open(None, 0.0)  # type: ignore[arg-type]


def test_a_clock_that_goes_back_stands_still():
    """For requests too: the later of two requests does not come to stand first."""
    ledger = JobLedger(RequestFCFS(), KNOWN)
    first, second = ledger.open("short", 10.0), ledger.open("short", 10.0)
    ledger.request(first, 10.0)
    ledger.request(second, 5.0)
    assert (first.requested, second.requested) == (10.0, 10.0)
    assert ledger.rank(first, 10.0) <= ledger.rank(second, 10.0)


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf])
def test_a_clock_that_says_no_time_is_refused(now):
    ledger = JobLedger(RequestFCFS(), KNOWN)
    with pytest.raises(DemandError, match="the clock says"):
        ledger.open("short", now)
    assert ledger.open("short", 1.0).arrival == 1.0


def test_time_away_is_no_wait_under_mlfq() -> None:
    """A job that was in a tool for longer than it may starve comes back to its own queue."""
    ledger = JobLedger(MLFQ(1.0, starvation_seconds=10.0), KNOWN)
    away = ledger.open("short", 0.0)
    ledger.start(away)
    ledger.serve(away, 6.0, 6.0)
    ledger.stop(away)
    own = ledger.rank(away, 6.0)
    waiting = ledger.open("short", 29.0)
    ledger.request(away, 30.0)
    assert ledger.rank(away, 30.0) == own > ledger.rank(waiting, 30.0)
    assert ledger.rank(away, 39.5) == own
    assert ledger.rank(away, 40.0) == (0.0, 40.0)
    ledger.request(away, 50.0)  # it gave up that request, and makes another
    assert ledger.rank(away, 50.0) == own
