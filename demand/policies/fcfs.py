"""First come, first served."""

from dataclasses import dataclass
from typing import final

from demand.errors import DemandError
from demand.policies.base import Policy
from demand.policies.job import Job
from demand.seconds import check_age


@final
@dataclass(frozen=True)
class FCFS(Policy):
    """Application-level FCFS: whole applications in order of arrival, never preempted.

    This is the order of Parrot (OSDI 2024); `RequestFCFS` is vLLM's, which queues each request
    anew.
    """

    def rank(self, job: Job, now: float) -> float:
        """Second of arrival."""
        return job.arrival


@final
@dataclass(frozen=True)
class Oracle(Policy):
    """Shortest remaining processing time with the true demands: optimal on one server, unreal."""

    def rank(self, job: Job, now: float) -> float:
        """True remaining seconds.

        Raises:
            DemandError: the true demand of the job is not known, or service that is negative or not
                finite.
        """
        remaining = job.demand - check_age(job.attained_service)
        if remaining != remaining:
            raise DemandError(
                f"the demand of job {job.index} is {job.demand}; an oracle serves only where true "
                "demands are known, as in a simulation"
            )
        return remaining


@final
@dataclass(frozen=True)
class EDF(Policy):
    """Earliest deadline first (Liu and Layland 1973); jobs without a deadline come last.

    Meets every deadline on one server whenever any order does; under overload it may meet few.
    """

    def rank(self, job: Job, now: float) -> float:
        """Second of the deadline."""
        return job.deadline


@final
@dataclass(frozen=True)
class RandomOrder(Policy):
    """Jobs by a number drawn once for each: the row that shows what knowing nothing gives."""

    def rank(self, job: Job, now: float) -> float:
        """The number the job drew."""
        return job.lottery


@final
@dataclass(frozen=True)
class RequestFCFS(Policy):
    """Requests in order of submission: each call of an application queues anew.

    The order of vLLM (SOSP 2023), and the baseline of the Hermes paper (arXiv 2506.14851). Where
    the scheduler does not see requests (a workload without `runs`), it is `FCFS`.
    """

    @property
    def by_request(self) -> bool:
        """Yes."""
        return True

    def rank(self, job: Job, now: float) -> float:
        """Second at which the present request was submitted."""
        return job.requested
