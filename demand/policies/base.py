"""What every scheduling policy is: a job as a policy sees it, and the protocol it answers to."""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from demand.distribution.distribution import Distribution
from demand.errors import DemandError

Rank = float | tuple[float, ...]
"""Smaller is served first. Tuples compare entry by entry: a class, then a rank within it. All
ranks that one policy gives are of one form, and none is NaN."""


@dataclass(slots=True, eq=False)
class Job:
    """One application in the system. The scheduler that owns it keeps it current.

    Args:
        index: position in order of arrival; ties of rank go to the smaller index (FCFS).
        application: name of the application.
        arrival: second at which it arrived.
        distribution: what is known of its demand in seconds, counted from `known_at` on.
        demand: its true total demand in seconds; only an oracle may read it.
        attained_service: seconds of service received so far.
        lottery: a uniform number in [0, 1), drawn from the seed of the simulation.
        table: what `Policy.table` made of `distribution`; None for nothing.
        deadline: second by which it should be finished; infinity for none.
        tenant: who pays for it; fair sharing is among tenants.
        weight: share of its tenant relative to the others.
        priority: class that a priority policy serves by, smaller first.

    Attributes:
        prior: what was known of its total demand on arrival.
        known_at: attained service at which `distribution` was learned.
        requested: second at which its present request was submitted; that of arrival at first.
        running: whether it is being served.
        started_at: attained service when it was last put into service.
        state: what `Policy.new_state` gave the scheduler, shared by all its jobs.

    Raises:
        DemandError: an arrival that is not finite, a deadline or priority that is NaN, a weight
            that is not positive and finite, service or a demand that is negative.
    """

    index: int
    application: str
    arrival: float
    distribution: Distribution
    demand: float = math.nan
    attained_service: float = 0.0
    lottery: float = 0.0
    table: Any = None
    deadline: float = math.inf
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    prior: Distribution = field(init=False)
    known_at: float = field(init=False, default=0.0)
    requested: float = field(init=False)
    running: bool = field(init=False, default=False)
    started_at: float = field(init=False, default=0.0)
    state: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not (
            -math.inf < self.arrival < math.inf
            and self.deadline == self.deadline
            and 0.0 <= self.attained_service < math.inf
            and 0.0 < self.weight < math.inf
            and -math.inf <= self.priority <= math.inf
            and not self.demand < 0.0
        ):
            self._refuse()
        self.prior = self.distribution
        self.requested = self.arrival

    def _refuse(self) -> None:
        for name, good, expected in (
            ("arrival", math.isfinite(self.arrival), "finite seconds"),
            ("deadline", self.deadline == self.deadline, "seconds, infinity for none"),
            (
                "attained_service",
                0.0 <= self.attained_service < math.inf,
                "finite seconds of at least 0",
            ),
            ("weight", 0.0 < self.weight < math.inf, "a positive finite number, 1 for all alike"),
            ("priority", -math.inf <= self.priority <= math.inf, "a number, 0 for all alike"),
            ("demand", not self.demand < 0.0, "seconds of at least 0, NaN if unknown"),
        ):
            if not good:
                raise DemandError(
                    f"{name} of job {self.index} is {getattr(self, name)}; expected {expected}"
                )

    @property
    def age(self) -> float:
        """Seconds of service since `distribution` was learned: the age to ask it for."""
        return self.attained_service - self.known_at

    def learn(self, remaining: Distribution, table: Any) -> None:
        """Take in what its progress says: the distribution of its demand from here on.

        One that is `extrapolated` says nothing: what was known stays and its age runs on, so that
        the job does not come to look nearly done as it is served beyond all samples.
        """
        if remaining.extrapolated:
            return
        self.distribution, self.table = remaining, table
        self.known_at = self.attained_service

    def attained_at(self, age: float) -> float:
        """Least attained service at which `age` is reached."""
        if self.known_at == 0.0:
            return age
        attained = self.known_at + age
        while attained - self.known_at < age:  # the sum was rounded down
            attained = math.nextafter(attained, math.inf)
        while (below := math.nextafter(attained, 0.0)) - self.known_at >= age:  # or up
            attained = below
        return attained


class Policy(ABC):
    """Ranks jobs; the smaller rank is served first, ties in order of arrival.

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

    def line(self, job: Job) -> Hashable:
        """Of a policy that `reranks`: a name for the jobs whose ranks move with that of `job`.

        Asked once, when `job` has arrived. No arrival, service or departure then changes the rank
        of a waiting job, except that serving `job` may change those of its own line; and among
        those that wait in a line the order of arrival is always the order of rank. `simulate`
        ranks the first of each line alone. None promises nothing: all are ranked at every event.

        Raises:
            DemandError: by `simulate`, where it sees that the order within a line is another.
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


def number(rank: Rank, policy: Policy) -> float:
    """`rank` where `policy` can do with a single number only.

    Raises:
        DemandError: a tuple.
    """
    if isinstance(rank, tuple):
        raise DemandError(
            f"{policy!r} got the rank {rank}; it takes policies that rank by one number: put "
            "PriorityClasses or DeadlineMix around it, not inside"
        )
    return rank


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


def rank_of(job: Job, policy: Policy, now: float) -> Rank:
    """Rank of `job` under `policy` at second `now`.

    Raises:
        DemandError: a rank of NaN, or a tuple that has one.
    """
    rank = policy.rank(job, now)
    if not isinstance(rank, tuple):
        if rank == rank:
            return rank
    else:
        for entry in rank:  # a generator would cost as much as the rank
            if entry != entry:
                break
        else:
            return rank
    raise DemandError(f"{policy!r} ranked job {job.index} NaN ({rank}); ranks must be ordered")
