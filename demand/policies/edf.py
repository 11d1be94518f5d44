"""Earliest deadline first."""

from dataclasses import dataclass
from typing import final

from demand.policies.base import Job, Policy


@final
@dataclass(frozen=True)
class EDF(Policy):
    """Earliest deadline first (Liu and Layland 1973); jobs without a deadline come last.

    Meets every deadline on one server whenever any order does; under overload it may meet few.
    """

    def rank(self, job: Job, now: float) -> float:
        """Second of the deadline."""
        return job.deadline
