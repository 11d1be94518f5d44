"""Shortest application class first."""

from dataclasses import dataclass
from typing import final

from typing_extensions import override

from demand.policies.base import Policy, Rank, number
from demand.policies.job import Job
from demand.policies.mean_demand import mean_demand, next_mean_above


@final
@dataclass(frozen=True)
class ClassMean(Policy):
    """Applications with the smaller mean total demand first, whatever service was attained.

    The baseline that an honest table carries: it knows one number per application, and on mixes
    whose applications differ much in mean it gets most of what Gittins gets. An application never
    seen before (`NEVER_SEEN`) has no mean and ranks by attained service.
    """

    @override
    def rank(self, job: Job, now: float) -> float:
        """Mean total seconds of the application."""
        return mean_demand(job)

    @override
    def next_above(self, job: Job, threshold: Rank) -> float:
        """Infinity: a mean stands still, but for applications never seen before."""
        return next_mean_above(job, number(threshold, self))
