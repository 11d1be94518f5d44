"""A job as the servers of the simulator see it."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import final

from demand.policies.base import Job, Rank


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
        place: its rank when the running tasks were last compared, and its order of arrival, which
            no other task shares.
    """

    job: Job
    entry: int
    ends: Sequence[float]
    line: Hashable = None
    at: int = 0
    since: float = 0.0
    stop_age: float = 0.0
    stop: float = math.inf
    place: tuple[Rank, int] = (math.nan, 0)
