"""A job as the servers of the queue keep it."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import final

from demand.policies.base import Rank
from demand.policies.job import Job

Place = tuple[Rank, int]
"""Where a job stands in the order of service: its rank, then its order of arrival, which no other
job shares."""


@final
@dataclass(slots=True, eq=False)
class JobInService(Job):
    """A job in the queue, waiting or running: what its policy sees, and what the servers note.

    Attributes:
        entry: its position in the workload.
        ends: attained service at the end of each of its units, its demand last.
        units_finished: how many of them it has reached.
        line_key: key of its line (`Policy.line`), if the policy `reranks`.
        since: second as of which `attained_service` is known, while it runs.
        stop_attained: attained service at which it stops, if nothing happens before: the end of a
            unit, or where its rank may exceed that of the best job waiting.
        stop: second at which it attains that.
        place: where it stood when it was last ranked.
        exact: whether it stands there still, `bound` being that very place.
        bound: the worst place it can have come to (`BoundedRanks`); `None` where that is not known.
        bound_until: second up to which `bound` surely holds.
        halfway: whether it stops half-way to the best job waiting, where nothing happens but that
            its bound is found anew.
    """

    entry: int = 0
    ends: Sequence[float] = ()
    units_finished: int = 0
    line_key: Hashable = None
    since: float = 0.0
    stop_attained: float = 0.0
    stop: float = math.inf
    place: Place = (math.nan, 0)
    exact: bool = False
    bound: Place | None = None
    bound_until: float = math.inf
    halfway: bool = False
