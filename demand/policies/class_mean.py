"""Shortest application class first."""

from dataclasses import dataclass
from typing import final

from demand.policies.base import Job, Policy


@final
@dataclass(frozen=True)
class ClassMean(Policy):
    """Applications with the smaller mean total demand first, whatever service was attained.

    The baseline that an honest table carries: it knows one number per application, and on mixes
    whose applications differ much in mean it gets most of what Gittins gets.
    """

    def rank(self, job: Job, now: float) -> float:
        """Mean total seconds of the application."""
        return job.prior.mean()
