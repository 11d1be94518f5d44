"""The five policies that rank by a number the job carries: no table, no memory, no thresholds.

`FCFS`, `RequestFCFS`, `EDF`, `RandomOrder`, and `Oracle`, which serves by the true demand.
"""

from dataclasses import dataclass
from typing import final

from typing_extensions import override

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

    @override
    def rank(self, job: Job, now: float) -> float:
        """Second of arrival."""
        return job.arrival


@final
@dataclass(frozen=True)
class RequestFCFS(Policy):
    """Requests in order of submission: each call of an application queues anew.

    The order of vLLM (SOSP 2023), and the baseline of the Hermes paper (arXiv 2506.14851). Where
    the scheduler does not see requests (a workload without `runs`), it is `FCFS`.
    """

    @property
    @override
    def by_request(self) -> bool:
        return True

    @override
    def rank(self, job: Job, now: float) -> float:
        """Second at which the present request was submitted."""
        return job.requested


@final
@dataclass(frozen=True)
class EDF(Policy):
    """Earliest deadline first (Liu and Layland 1973); jobs without a deadline come last.

    Meets every deadline on one server whenever any order does; under overload it may meet few.
    """

    @override
    def rank(self, job: Job, now: float) -> float:
        """Second of the deadline."""
        return job.deadline


@final
@dataclass(frozen=True)
class RandomOrder(Policy):
    """Jobs in a random order, drawn once: the baseline that shows what knowing nothing gives."""

    @override
    def rank(self, job: Job, now: float) -> float:
        """The number the job drew."""
        return job.lottery


@final
@dataclass(frozen=True)
class Oracle(Policy):
    """Shortest remaining processing time (SRPT, Schrage 1968), by the true demands.

    It minimises the mean completion time on one server, and cannot be had outside of a simulation.
    """

    @override
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
