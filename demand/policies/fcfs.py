"""First come, first served."""

from dataclasses import dataclass
from typing import final

from demand.policies.base import Job, Policy


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
