"""A job as the servers of the simulator see it."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import final

from demand.policies.base import Job, Rank

Place = tuple[Rank, int]
"""Rank and order of arrival."""


@final
@dataclass(slots=True, eq=False)
class Task:
    """A job in the queue, and how its service goes on.

    Attributes:
        job: the job.
        entry: its position in the workload.
        ends: attained service at the end of each of its units, its demand last.
        line: in which it waits, if the policy `reranks`.
        at: units finished.
        since: second as of which `job.attained_service` is known, while it is served.
        stop_age: attained service at which it is looked at, if nothing happens before.
        stop: second at which it attains that.
        place: its rank as of the last ranking, and its order of arrival, which no other task
            shares.
        bound: what its place stays within while it is served, if that is known; from a ranking
            until it is watched the very object `place`.
        bound_until: second up to which it surely does.
        half_way: whether it is looked at half-way to the best that waits, which is no event;
            this and the bounds are of `BoundedServers`.
    """

    job: Job
    entry: int
    ends: Sequence[float]
    line: Hashable = None
    at: int = 0
    since: float = 0.0
    stop_age: float = 0.0
    stop: float = math.inf
    place: Place = (math.nan, 0)
    bound: Place | None = None
    bound_until: float = math.inf
    half_way: bool = False
