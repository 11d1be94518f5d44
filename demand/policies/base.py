"""What every scheduling policy answers to, and how its answers are read and refused."""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from numbers import Rational, Real
from typing import Any, cast

import numpy as np

from demand.arguments import check_instance
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.policies.job import Job
from demand.seconds import one_number

Rank = float | tuple[float, ...]
"""Smaller is served first. Tuples compare entry by entry: a class, then a rank within it. All
ranks that one policy gives are of one form, and none is NaN."""


_HUGE = 2.0**1023
"""Whole numbers from here on are refused as ranks: thresholds between ranks are floats."""


class Policy(ABC):
    """Ranks jobs; the job of the smallest rank is served first, ties in order of arrival.

    A policy is configuration only: a frozen dataclass that is shared freely. What it computes
    per distribution (`table`) is computed once and kept by the scheduler on the jobs; what it
    remembers between events (`new_state`) is made once per scheduler and hangs on every job.

    A scheduler relies on the rank of a job not changing while it waits, unless `reranks` says
    that it may; it may change as the job is put into service or out of it (`Job.running`). A rank
    that drifts alike for all jobs leaves the drift out (least slack, deadline - now - remaining,
    orders like deadline - remaining).
    """

    @property
    def reranks(self) -> bool:
        """Whether serving one job can change the rank of others.

        They are then ranked anew at every event, at a cost that grows with the jobs present, unless
        `line` says whose ranks move.
        """
        return False

    @property
    def by_request(self) -> bool:
        """Whether ranks read `Job.requested`: simulators then stop at the end of every unit."""
        return False

    @property
    def by_clock(self) -> bool:
        """Whether ranks read the seconds on the clock at which service was received (`served`).

        A scheduler may tell of many seconds of service at once, and seconds of service need not be
        seconds on the clock: on an engine parallel calls, and a prompt, receive many a second. The
        engine's simulator then tells of the service of every step when it ends, so that every step
        is a decision, as where `reranks`.
        """
        return False

    def line(self, job: Job) -> Hashable:
        """Key of the FIFO sub-queue of `job`, such as its tenant; only its head is ranked.

        Of a policy that `reranks`, and asked once, when `job` has arrived. Jobs of one key form a
        line, of which a policy promises that

        - no arrival, service or departure changes the rank of a waiting job, except that serving a
          job may change the ranks of its own line;
        - the waiting jobs of a line rank in order of arrival, always.

        So `simulate` ranks the first of each line alone, anew only where the line was served.
        `None` promises nothing: all waiting jobs are then ranked at every event.

        Raises:
            DemandError: by `simulate`, where it sees that a line ranks in another order.
        """
        return None

    @abstractmethod
    def rank(self, job: Job, now: float) -> Rank:
        """Rank of `job` at second `now`, from what the job is now (`running` included)."""

    def table(self, distribution: Distribution) -> Any:
        """What the policy computes once per distribution, a `RankTable` say; None for nothing."""
        return None

    def next_above(self, job: Job, threshold: Rank) -> float:
        """Attained service, from the present on, up to which the rank stays within `threshold`.

        Asked of running jobs whose rank is within it now. The best answer is the least attained
        service at which the rank exceeds `threshold`; an earlier one costs a simulator an event
        that changes nothing, a later one is wrong. Infinity if it never does, as for all ranks
        that do not rise with service. This default asks the table, if there is one.

        Where service is counted in whole quanta, the answer is the end of a quantum, though the
        rank rises up to `exact_thresholds.ROUNDING` of a quantum before it: what simulators make
        of the answer allows for that.
        """
        if job.table is None:
            return math.inf
        above = job.table.next_above(job.attained_service - job.known_at, threshold)
        return above if job.known_at == 0.0 else job.attained_at(above)

    def new_state(self) -> Any:
        """What one scheduler remembers for this policy (`Job.state`); None for nothing."""
        return None

    def arrived(self, job: Job, now: float) -> None:  # noqa: B027
        """Told of every job as it arrives, before it is first ranked."""

    def served(self, job: Job, seconds: float, now: float) -> None:  # noqa: B027
        """Told of `seconds` of service that `job` received up to `now`, before it is ranked."""

    def departed(self, job: Job, now: float) -> None:  # noqa: B027
        """Told of every job as it finishes."""


def check_policy(name: str, policy: object) -> None:
    """Raise `DemandError` unless `policy` is a policy: an instance, not its class."""
    check_instance(name, policy, Policy, "a policy, such as Gittins()")


def rank_of(job: Job, policy: Policy, now: float) -> Rank:
    """Rank of `job` under `policy` at second `now`, as every scheduler asks for it.

    Raises:
        DemandError: a rank that is neither a number nor a tuple of numbers, or is NaN.
    """
    rank = policy.rank(job, now)
    if type(rank) is float:  # nearly all are: the rest may take longer
        if rank == rank:
            return rank
    elif type(rank) is tuple:
        try:
            total = 0.0
            for entry in rank:  # numbers have a sum, a finite one if they are; no faster way found
                total += entry
            if type(total) is float and -_HUGE < total < _HUGE and rank:
                return rank
        except (TypeError, OverflowError):
            pass
    return _checked(rank, job, policy)


def number(rank: Rank, policy: Policy) -> float:
    """`rank`, which `policy` got from the policy within, where it takes a single number only.

    Raises:
        DemandError: a tuple, or what is no number.
    """
    if type(rank) is float:
        return rank
    if isinstance(rank, tuple):
        raise DemandError(
            f"{policy!r} got the rank {rank}; it takes policies that rank by one number: put "
            "PriorityClasses or DeadlineMix around it, not inside"
        )
    found = _number(rank)
    if found is None:
        raise DemandError(f"{policy!r} got the rank {rank!r:.200} from within; expected a number")
    return found


def table_of(job: Job) -> Any:
    """The table of `job`.

    Raises:
        DemandError: the job carries none.
    """
    if job.table is None:
        raise DemandError(
            f"job {job.index} of {job.application!r} has no table; give it "
            "table=policy.table(job.distribution), once per application"
        )
    return job.table


def _checked(rank: object, job: Job, policy: Policy) -> Rank:
    """`rank`, of which nothing is known; 0-d arrays and tensors as the float they hold."""
    entries = rank if isinstance(rank, tuple) else (rank,)
    numbers = [found for entry in entries if (found := _number(entry)) is not None]
    if len(numbers) < len(entries) or not entries:
        raise DemandError(
            f"{policy!r} ranked job {job.index} {rank!r:.200}; expected a number or a tuple of "
            "numbers, of which the smallest goes first: have `rank` return one for every job"
        )
    if any(each != each for each in numbers):
        raise DemandError(f"{policy!r} ranked job {job.index} NaN ({rank}); ranks must be ordered")
    return tuple(numbers) if isinstance(rank, tuple) else numbers[0]


def _number(value: Any) -> float | None:
    """`value` if it is a number, the float that a 0-d array or tensor holds, or `None`."""
    if isinstance(value, Real) and not isinstance(value, np.timedelta64):
        number = cast(float, value)
        huge = isinstance(value, Rational) and not -_HUGE < number < _HUGE
        return None if huge else number
    try:
        return one_number("rank", value)
    except DemandError:
        return None
