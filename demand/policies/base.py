"""What every scheduling policy is: a job as a policy sees it, and the protocol it answers to."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from demand.distribution import Distribution
from demand.rank_table import RankTable


@dataclass(slots=True, eq=False)
class Job:
    """One application in the system. The scheduler that owns it keeps it current.

    Args:
        index: position in order of arrival; ties of rank go to the smaller index (FCFS).
        application: name of the application.
        arrival: second at which it arrived.
        distribution: what is known of its total demand.
        demand: its true total demand in seconds; only an oracle may read it.
        attained_service: seconds of service received so far.
        lottery: a uniform number in [0, 1), drawn from the seed of the simulation.
        table: what `Policy.table` made of `distribution`.
    """

    index: int
    application: str
    arrival: float
    distribution: Distribution
    demand: float = math.nan
    attained_service: float = 0.0
    lottery: float = 0.0
    table: RankTable | None = None


class Policy(ABC):
    """Ranks jobs; the smaller rank is served first, ties in order of arrival.

    A policy is configuration only: a frozen dataclass that is shared freely. What it computes
    per application (`table`) is computed once and kept by the scheduler on the jobs.

    The simulator relies on the order of two waiting jobs not changing while both wait. A rank
    may use `now` only in ways that keep it so: for a rank that drifts alike for all jobs, leave
    the drift out (least slack, deadline - now - remaining, orders like deadline - remaining).
    """

    @abstractmethod
    def rank(self, job: Job, now: float) -> float:
        """Rank of `job` at second `now`."""

    def table(self, distribution: Distribution) -> RankTable | None:
        """Ranks by age for one application, for policies that use them."""
        return None

    def next_above(self, job: Job, threshold: float) -> float:
        """Least attained service, from the present on, at which the rank exceeds `threshold`.

        Infinity if it never does, as for all ranks that do not rise with service.
        """
        if job.table is None:
            return math.inf
        return job.table.next_above(job.attained_service, threshold)
