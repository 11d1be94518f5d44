"""What every scheduling policy is: a job as a policy sees it, and the protocol it answers to."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from demand.distribution import Distribution
from demand.rank_table import RankTable

Rank = float | tuple[float, ...]
"""Smaller is served first. Tuples compare entry by entry: a class, then a rank within it. All
ranks that one policy gives are of one form."""


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
        table: what `Policy.table` made of `distribution`.
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
    """

    index: int
    application: str
    arrival: float
    distribution: Distribution
    demand: float = math.nan
    attained_service: float = 0.0
    lottery: float = 0.0
    table: RankTable | None = None
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
        self.prior = self.distribution
        self.requested = self.arrival

    @property
    def age(self) -> float:
        """Seconds of service since `distribution` was learned: the age to ask it for."""
        return self.attained_service - self.known_at

    def learn(self, remaining: Distribution, table: RankTable | None) -> None:
        """Take in what its progress says: the distribution of its demand from here on."""
        self.distribution, self.table = remaining, table
        self.known_at = self.attained_service


class Policy(ABC):
    """Ranks jobs; the smaller rank is served first, ties in order of arrival.

    A policy is configuration only: a frozen dataclass that is shared freely. What it computes
    per distribution (`table`) is computed once and kept by the scheduler on the jobs; what it
    remembers between events (`new_state`) is made once per scheduler and hangs on every job.

    A scheduler relies on the order of two waiting jobs not changing while both wait, unless
    `reranks` says that it may. A rank may use `now` only in ways that keep it so: for a rank that
    drifts alike for all jobs, leave the drift out (least slack, deadline - now - remaining,
    orders like deadline - remaining).
    """

    reranks: ClassVar[bool] = False
    """Whether serving one job can change the order of others: they are then ranked anew at every
    event, at a cost that grows with the number of jobs present."""

    @abstractmethod
    def rank(self, job: Job, now: float) -> Rank:
        """Rank of `job` at second `now`, from what the job is now (`running` included)."""

    def table(self, distribution: Distribution) -> RankTable | None:
        """Ranks by age for one distribution, for policies that use them."""
        return None

    def next_above(self, job: Job, threshold: Rank) -> float:
        """Least attained service, from the present on, at which the rank exceeds `threshold`.

        Asked of running jobs. Infinity if it never does, as for all ranks that do not rise with
        service.
        """
        if job.table is None:
            return math.inf
        assert not isinstance(threshold, tuple)
        return job.known_at + job.table.next_above(job.age, threshold)

    def new_state(self) -> Any:
        """What one scheduler remembers for this policy (`Job.state`); None for nothing."""
        return None

    def arrived(self, job: Job, now: float) -> None:  # noqa: B027
        """Told of every job as it arrives, before it is first ranked."""

    def served(self, job: Job, seconds: float, now: float) -> None:  # noqa: B027
        """Told of `seconds` of service that `job` received up to `now`, before it is ranked."""

    def departed(self, job: Job, now: float) -> None:  # noqa: B027
        """Told of every job as it finishes."""
