"""Deadlines for jobs that have none."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import numpy as np

from demand.arguments import instance_of, whole_number
from demand.errors import DemandError
from demand.seconds import one_number
from demand.workloads.workload import Workload

DEADLINE_FACTORS: Mapping[str, float] = MappingProxyType(
    {"tight": 1.2, "modest": 1.5, "loose": 2.0}
)
"""Of the Hermes evaluation (arXiv 2506.14851)."""


def with_deadlines(
    workload: Workload,
    factor: float,
    of: Literal["mean", "demand"] = "demand",
    share: float = 1.0,
    seed: int = 0,
) -> Workload:
    """The same jobs, due a multiple of their demand after they arrive.

    Args:
        workload: the jobs.
        factor: seconds from arrival to deadline over seconds of demand; `DEADLINE_FACTORS`.
        of: "demand" multiplies the true demand of each job: what a user with that much work would
            wait for. "mean" multiplies what the scheduler takes for the mean of its application:
            one promise for all, which long jobs of an application cannot keep.
        share: of the jobs that get a deadline; the rest have none.
        seed: of the choice; a larger share adds to the jobs of a smaller one.

    Raises:
        DemandError: a factor that is not positive and finite, or a share outside [0, 1].
    """
    instance_of("workload", workload, Workload)
    factor, share = one_number("factor", factor), one_number("share", share)
    if not 0.0 < factor < np.inf:
        raise DemandError(f"factor is {factor}; expected a positive number, such as 1.5")
    if not 0.0 <= share <= 1.0:
        raise DemandError(f"share is {share}; expected a number between 0 and 1")
    if of == "mean":
        means = {name: known.mean() for name, known in workload.distributions.items()}
        work = np.array([means[name] for name in workload.applications])
    elif of == "demand":
        work = workload.demands
    else:
        raise DemandError(f"of is {of!r}; expected mean or demand")
    timed = np.random.default_rng(whole_number("seed", seed, least=0)).random(len(workload)) < share
    return replace(workload, deadlines=np.where(timed, workload.arrivals + factor * work, np.inf))
