"""The oracle."""

from dataclasses import dataclass
from typing import final

from demand.policies.base import Job, Policy


@final
@dataclass(frozen=True)
class Oracle(Policy):
    """Shortest remaining processing time with the true demands: optimal on one server, unreal."""

    def rank(self, job: Job, now: float) -> float:
        """True remaining seconds."""
        return job.demand - job.attained_service
