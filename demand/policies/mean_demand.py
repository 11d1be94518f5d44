"""Mean demand as a rank, also of applications never seen before: their attained service."""

import math

from demand.distribution.atoms import RESOLUTION_SECONDS
from demand.distribution.never_seen import NEVER_SEEN
from demand.distribution.rank_table import RankTable
from demand.policies.job import Job

_BY_ATTAINED_SERVICE = RankTable(NEVER_SEEN)


def has_mean(job: Job) -> bool:
    """Whether the application of `job` was seen before: `mean_demand` then stands still."""
    return job.prior.mean() > RESOLUTION_SECONDS


def mean_demand(job: Job) -> float:
    """Mean total demand of the application of `job`; its attained service if never seen."""
    mean = job.prior.mean()
    if mean > RESOLUTION_SECONDS:
        return mean
    return _BY_ATTAINED_SERVICE.at(job.attained_service)


def next_mean_above(job: Job, threshold: float) -> float:
    """Least attained service at which `mean_demand` exceeds `threshold`; infinity if none."""
    if has_mean(job):
        return math.inf
    return _BY_ATTAINED_SERVICE.next_above(job.attained_service, threshold)
