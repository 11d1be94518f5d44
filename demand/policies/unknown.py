"""Applications never seen before: they are ranked by attained service, and a warning says so."""

import math
import warnings
from collections.abc import Mapping

from demand.atoms import RESOLUTION_SECONDS
from demand.distribution import Distribution
from demand.policies.base import Job
from demand.ranks.table import RankTable

NEVER_SEEN = Distribution([0.0])
"""What is known of an application without a single run.

Every age lies beyond its samples, so that by the doubling rule (`demand.atoms.beyond_samples`)
its remaining demand, and with it every rank by age, is its attained service rounded down to a
power of two of nanoseconds: least attained service first, in steps, in seconds like all others.
"""

_BY_ATTAINED_SERVICE = RankTable(NEVER_SEEN)


def known_of(application: str, distributions: Mapping[str, Distribution]) -> Distribution:
    """What `distributions` says of `application`; `NEVER_SEEN`, with a warning, if nothing.

    The standard warning filter shows the warning once for each application.
    """
    found = distributions.get(application)
    if found is None:
        warnings.warn(
            f"application {application!r} was never seen before; its jobs are ranked by attained "
            "service until it has a distribution",
            stacklevel=2,
        )
        return NEVER_SEEN
    return found


def has_mean(job: Job) -> bool:
    """Whether the application of `job` was seen, so that `mean_demand` stands still."""
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
