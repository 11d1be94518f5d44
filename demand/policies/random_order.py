"""Random order."""

from dataclasses import dataclass
from typing import final

from demand.policies.base import Job, Policy


@final
@dataclass(frozen=True)
class RandomOrder(Policy):
    """Jobs by a number drawn once for each: the row that shows what knowing nothing gives."""

    def rank(self, job: Job, now: float) -> float:
        """The number the job drew."""
        return job.lottery
