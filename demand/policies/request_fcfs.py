"""First come, first served, request by request."""

from dataclasses import dataclass
from typing import final

from demand.policies.base import Job, Policy


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
