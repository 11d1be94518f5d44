"""A closed loop: users who wait for one job to finish before they submit the next."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from demand.arguments import instance_of, whole_number
from demand.errors import DemandError
from demand.lazy_runs import PickedRuns
from demand.seconds import Floats, as_seconds, one_of_seconds
from demand.workloads.workload import Application, Workload, poisson_workload


@final
@dataclass(frozen=True, eq=False)
class ClosedLoop:
    """Jobs of users, each of whom has one job at a time.

    The first job of a user arrives at its second in `jobs.arrivals`. Each later one arrives when
    its own `think_seconds` have passed since the user's job before it finished, whatever
    `jobs.arrivals` says; a deadline keeps its distance from the arrival. Random numbers are common:
    under every policy a user submits the same jobs after the same times of thought.

    Args:
        jobs: the jobs of all users, in the order in which each user submits them.
        users: `[n]` who submits each.
        think_seconds: `[n]` between the finish of a user's job and the arrival of the next.

    Raises:
        DemandError: lengths that differ, or think times that are negative or not finite.
    """

    jobs: Workload
    users: Sequence[int] = field(repr=False)
    think_seconds: Floats = field(repr=False)

    def __post_init__(self) -> None:
        instance_of("jobs", self.jobs, Workload)
        thinks = as_seconds("think_seconds", self.think_seconds)
        thinks.setflags(write=False)
        object.__setattr__(self, "think_seconds", thinks)
        object.__setattr__(self, "users", tuple(self.users))
        if thinks.shape != (len(self.jobs),) or len(self.users) != len(self.jobs):
            raise DemandError(
                f"there are {len(self.jobs)} jobs, {len(self.users)} users and think_seconds of "
                f"shape {thinks.shape}; expected one of each per job"
            )
        if not (np.isfinite(thinks) & (thinks >= 0.0)).all():
            raise DemandError("think_seconds has a negative or non-finite entry; expected seconds")

    def __len__(self) -> int:
        return len(self.jobs)

    def arrived(self, order: Sequence[int], arrivals: Floats) -> Workload:
        """The workload as it was: entries in the `order` in which they came, at `arrivals`."""
        jobs, entries = self.jobs, np.array(order)
        return replace(
            jobs,
            arrivals=arrivals,
            demands=jobs.demands[entries],
            applications=[jobs.applications[entry] for entry in order],
            deadlines=jobs.deadlines[entries] + (arrivals - jobs.arrivals[entries]),
            tenants=[jobs.tenants[entry] for entry in order],
            priorities=[jobs.priorities[entry] for entry in order],
            runs=None if jobs.runs is None else PickedRuns(jobs.runs, entries),
        )


def closed_loop(
    applications: Sequence[Application],
    users: int,
    think_seconds: float,
    jobs: int,
    seed: int = 0,
) -> ClosedLoop:
    """Draw the jobs of `users` alike, with exponential think times, also before their first jobs.

    Args:
        applications: drawn from by weight.
        users: how many; the jobs are dealt to them in turn.
        think_seconds: mean time of thought.
        jobs: how many in all.
        seed: of applications, demands and think times, which have a stream each.

    Raises:
        DemandError: no users, more users than jobs, a think time that is negative or not finite,
            or as `poisson_workload`.
    """
    seed = whole_number("seed", seed, least=0)
    users, jobs = whole_number("users", users), whole_number("jobs", jobs, least=1)
    think_seconds = one_of_seconds("think_seconds", think_seconds)
    if not 1 <= users <= jobs:
        raise DemandError(f"users is {users} for {jobs} jobs; expected from 1 to as many as jobs")
    if not 0.0 <= think_seconds < np.inf:
        raise DemandError(f"think_seconds is {think_seconds}; expected finite seconds, 0 for none")
    drawn = poisson_workload(applications, 1.0, jobs, seed)
    thinks = np.random.default_rng([seed, jobs]).exponential(size=jobs) * think_seconds
    thinks[:users].sort()
    arrivals = thinks.copy()
    arrivals[users:] = thinks[users - 1]  # these arrive when their users submit them
    opened = replace(drawn, arrivals=arrivals, load=math.nan, deadlines=np.full(jobs, np.inf))
    return ClosedLoop(opened, [entry % users for entry in range(jobs)], thinks)
