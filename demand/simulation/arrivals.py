"""When the jobs of a simulation arrive: at given times, or as their users submit them."""

import math
from bisect import insort
from typing import Protocol, cast

from demand.arguments import check_instance
from demand.workloads.closed_loop import ClosedLoop
from demand.workloads.workload import Workload


class Arrivals(Protocol):
    """The entries of a workload, one after the other as they arrive.

    Attributes:
        next: second of the next arrival; infinity if none is known.
    """

    next: float

    def take(self) -> int:
        """The entry that arrives at `next`; the one after it is then the next."""

    def finished(self, entry: int, now: float) -> None:
        """The job of `entry` has finished at second `now`: its user may submit another."""


def entries_of(workload: object) -> Workload:
    """All jobs of `workload`, as they were drawn.

    Raises:
        DemandError: neither a workload nor a closed loop.
    """
    if isinstance(workload, ClosedLoop):
        return workload.jobs
    expected = "a Workload or a ClosedLoop, such as hermes_mix(load=0.8, jobs=1000)"
    check_instance("workload", workload, Workload, expected)
    return cast(Workload, workload)


def arrivals_of(workload: Workload | ClosedLoop) -> Arrivals:
    """The arrivals of an open or a closed workload."""
    if isinstance(workload, ClosedLoop):
        return _ClosedArrivals(workload)
    return _OpenArrivals(workload)


class _OpenArrivals:
    def __init__(self, workload: Workload) -> None:
        self._seconds: list[float] = [*workload.arrivals.tolist(), math.inf]
        self._entry = 0
        self.next = self._seconds[0]

    def take(self) -> int:
        entry = self._entry
        self._entry = entry + 1
        self.next = self._seconds[entry + 1]
        return entry

    def finished(self, entry: int, now: float) -> None:
        pass


class _ClosedArrivals:
    def __init__(self, loop: ClosedLoop) -> None:
        self._thinks: list[float] = loop.think_seconds.tolist()
        self._following: list[int | None] = [None] * len(loop)
        # Latest first, so that the next one is at the end; of equal seconds the first entry.
        self._pending: list[tuple[float, int]] = []
        last: dict[int, int] = {}
        for entry, user in enumerate(loop.users):
            if user in last:
                self._following[last[user]] = entry
            else:
                self._pending.append((-float(loop.jobs.arrivals[entry]), -entry))
            last[user] = entry
        self._pending.sort()
        self.next = -self._pending[-1][0]

    def take(self) -> int:
        entry = -self._pending.pop()[1]
        self._find_next()
        return entry

    def finished(self, entry: int, now: float) -> None:
        following = self._following[entry]
        if following is not None:
            insort(self._pending, (-(now + self._thinks[following]), -following))
            self._find_next()

    def _find_next(self) -> None:
        self.next = -self._pending[-1][0] if self._pending else math.inf
