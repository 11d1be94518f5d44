"""Least attained service."""

from dataclasses import dataclass
from typing import final

from demand.policies.base import Policy, Rank, number
from demand.policies.exact_thresholds import check_positive, next_end, whole_quanta
from demand.policies.job import Job
from demand.seconds import check_age


@final
@dataclass(frozen=True)
class LAS(Policy):
    """Least attained service first (foreground-background), over whole applications.

    This is the program-level order of Autellix (PLAS, arXiv 2502.13965). It needs to know nothing,
    and is optimal on one server where hazard rates fall (Aalto, Ayesta and Righter 2009).

    Attained service is counted in whole quanta: of jobs in the same quantum the first to arrive is
    served through it. The textbook discipline is the limit of a quantum of 0, where equal jobs
    share the server; Autellix uses a few levels of growing quanta and promotes jobs that starve,
    for which there is `Aging`.

    Args:
        quantum: seconds of service.

    Raises:
        DemandError: a quantum that is not positive and finite.
    """

    quantum: float = 1.0

    def __post_init__(self) -> None:
        check_positive("quantum", self.quantum)

    def rank(self, job: Job, now: float) -> float:
        """Attained service in seconds, whole quanta.

        Raises:
            DemandError: service that is negative or not finite.
        """
        return whole_quanta(check_age(job.attained_service), self.quantum) * self.quantum

    def next_above(self, job: Job, threshold: Rank) -> float:
        """The end of a quantum."""
        return next_end(job.attained_service, self.quantum, number(threshold, self))
