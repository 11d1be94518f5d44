"""What is known of an application before its first run."""

import warnings
from collections.abc import Mapping

from demand.arguments import check_instance, instance_of
from demand.distribution.distribution import Distribution

NEVER_SEEN = Distribution([0.0])
"""What is known of an application without a single run.

Its single sample is 0, so that every age lies beyond it. By the doubling rule (`beyond_samples`)
its remaining demand, and with it every rank by age, is its attained service rounded down to a
power of two of nanoseconds: least attained service first, in steps, in seconds like all others.
"""


def known_of(application: str, distributions: Mapping[str, Distribution]) -> Distribution:
    """What `distributions` says of `application`; `NEVER_SEEN`, with a warning, if nothing.

    The standard warning filter shows the warning once for each application.
    """
    check_instance("distributions", distributions, Mapping, "a mapping: a Distribution by name")
    found = distributions.get(application)
    if found is None:
        warnings.warn(
            f"application {application!r} was never seen before; its jobs are ranked by attained "
            "service until it has a distribution",
            stacklevel=2,
        )
        return NEVER_SEEN
    return instance_of(f"distribution of {application!r}", found, Distribution)


def unseen(attained_seconds: float = 0.0) -> Distribution:
    """What is known of the rest of an application of which no run was ever seen.

    `NEVER_SEEN` beyond its samples: whatever is asked of it follows the doubling rule.
    """
    return NEVER_SEEN.condition(attained_seconds) if attained_seconds else NEVER_SEEN
