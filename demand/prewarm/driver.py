"""Prewarming outside of a simulator: drives the backends of a user by a prewarmer's plans."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol, final, runtime_checkable

from demand.arguments import check_callable, check_instance, renamed_keyword
from demand.errors import DemandError
from demand.graph.pdgraph import PDGraph
from demand.prewarm.base import Prewarmer, check_prewarmer, check_warm_seconds
from demand.prewarm.successors import Warmable, backend_of, durations_of, successors_of
from demand.seconds import one_number
from demand.units import CostModel, Unit

_A_BACKEND = (
    "a backend, with warm_seconds, footprint, warm(job, unit) and release(job, unit), such as "
    "CallbackBackend(5.0, on_warm)"
)


@runtime_checkable
class Backend(Warmable, Protocol):
    """Something that a unit needs warm: a container, a model, an adapter, a KV prefix or chunks."""

    def warm(self, job: str, unit: str) -> None:
        """Start to warm what `unit` of `job` will need, and return at once.

        Called at most once for a unit of a job until it follows or is released.
        """

    def release(self, job: str, unit: str) -> None:
        """What was warmed for `unit` of `job` is not needed after all."""


@final
@dataclass(frozen=True)
class CallbackBackend:
    """A backend made of two functions of (job, unit).

    Args:
        warm_seconds: duration of a warm-up.
        on_warm: starts it and returns at once; hand slow work to an executor.
        on_release: undoes it; leave it out where what is warm may stay.
        footprint: what one warm instance occupies.

    Raises:
        DemandError: a warm-up that is negative or not finite.
    """

    warm_seconds: float
    on_warm: Callable[[str, str], object]
    on_release: Callable[[str, str], object] | None = None
    footprint: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "warm_seconds", check_warm_seconds(self.warm_seconds))
        check_callable("on_warm", self.on_warm, "a function of (job, unit)")
        if self.on_release is not None:
            check_callable("on_release", self.on_release, "a function of (job, unit)")

    def warm(self, job: str, unit: str) -> None:
        """Call `on_warm(job, unit)`."""
        self.on_warm(job, unit)

    def release(self, job: str, unit: str) -> None:
        """Call `on_release(job, unit)`, if there is one."""
        if self.on_release is not None:
            self.on_release(job, unit)


@final
class Prewarming:
    """Drives backends from what applications do, on the clock of the caller.

    Tell it when units start and finish, and call `tick` when `next_second` has come. A plan is
    made when a unit starts and stands until it finishes, or until the job is said to start a unit
    again: what is warm by then stays so. What was warmed for a unit that did not follow is released
    at the finish. The clock must be finite and never go backwards.

    Args:
        prewarmer: makes the plans.
        graphs: by application.
        backends: by name of a unit, or by kind for all units of the kind.
        pace: seconds that a call takes where the units run, as measured there, and not those that
            it counts for in a graph (`PDGraph.cost`); `None` for the defaults of `CostModel`. Up
            to the last release it was named `cost`.
        capacity: footprint that may be held warm ahead at once.

    Raises:
        DemandError: an argument of the wrong kind, a prewarmer that needs the truth, or a capacity
            that is negative or NaN.
    """

    @renamed_keyword("cost", "pace")
    def __init__(
        self,
        prewarmer: Prewarmer,
        graphs: Mapping[str, PDGraph],
        backends: Mapping[str, Backend],
        pace: CostModel | None = None,
        capacity: float = math.inf,
    ) -> None:
        check_prewarmer("prewarmer", prewarmer)
        check_instance("graphs", graphs, Mapping, "a mapping: a PDGraph by application")
        check_instance("backends", backends, Mapping, "a mapping: a backend by unit or by kind")
        for application, graph in graphs.items():
            check_instance(f"graphs[{application!r}]", graph, PDGraph, "a PDGraph")
        for name, backend in backends.items():
            check_instance(f"backends[{name!r}]", backend, Backend, _A_BACKEND)
        if prewarmer.knows == "truth":
            raise DemandError(f"{prewarmer!r} needs the truth, which only a simulator knows")
        capacity = one_number("capacity", capacity)
        if not capacity >= 0.0:
            raise DemandError(
                f"capacity is {capacity}; expected at least 0, or infinity for no bound"
            )
        self._prewarmer = prewarmer
        self._graphs = graphs
        self._backends = backends
        self._pace = CostModel() if pace is None else pace
        self._free = capacity
        self._now = -math.inf
        self._pending: list[tuple[float, int, int, str, Unit]] = []
        self._count = 0
        self._present: dict[str, int] = {}  # number of the present unit of each job
        self._warmed: dict[str, dict[str, Unit]] = {}

    @property
    def next_second(self) -> float:
        """When `tick` will have something to do; infinity for never."""
        return self._pending[0][0] if self._pending else math.inf

    def unit_started(
        self, job: str, application: str, unit: str, now: float, elapsed_seconds: float = 0.0
    ) -> None:
        """Plan for what may follow `unit`, which has been running for `elapsed_seconds`.

        Raises:
            DemandError: an application or a unit that is not known, elapsed seconds that are
                negative or not finite, or a clock that is not finite or goes backwards. Nothing
                has changed then.
        """
        if application not in self._graphs:
            raise DemandError(
                f"application {application!r} has no graph; expected one of "
                f"{', '.join(self._graphs)}"
            )
        graph = self._graphs[application]
        warm = self._warmed.get(job, {})
        successors = [
            (known, successor)
            for known, successor in successors_of(graph, unit, self._backends)
            if successor.unit not in warm
        ]
        durations = durations_of(graph, unit, self._pace)
        remaining = durations.condition(elapsed_seconds) if elapsed_seconds else durations
        self._advance(now)
        self._count += 1
        number = self._present[job] = self._count
        if not successors:
            return
        units = {successor.unit: known for known, successor in successors}
        for start in self._prewarmer.plan(remaining, [s for _, s in successors], self._free):
            self._count += 1
            entry = (now + start.seconds, self._count, number, job, units[start.unit])
            heappush(self._pending, entry)

    def tick(self, now: float) -> list[tuple[str, str]]:
        """Start the warm-ups that are due and still fit; (job, unit) of each.

        Raises:
            DemandError: a clock that is not finite or goes backwards.
        """
        self._advance(now)
        begun = []
        while self.next_second <= now:
            _, _, number, job, unit = heappop(self._pending)
            backend = backend_of(self._backends, unit)
            assert backend is not None
            if self._present.get(job) == number and backend.footprint <= self._free:
                self._free -= backend.footprint
                self._warmed.setdefault(job, {})[unit.name] = unit
                backend.warm(job, unit.name)
                begun.append((job, unit.name))
        return begun

    def unit_finished(self, job: str, following: str) -> bool:
        """Release what was warmed for `job`, but for the unit `following` ("end" for none).

        All are released even if a backend raises on one of them; its error comes through.

        Returns:
            Whether that one was warmed, or is being warmed.
        """
        self._present.pop(job, None)
        warmed = self._warmed.pop(job, {})
        with ExitStack() as releases:
            for name, unit in warmed.items():
                backend = backend_of(self._backends, unit)
                assert backend is not None
                self._free += backend.footprint
                if name != following:
                    releases.callback(backend.release, job, name)
        return following in warmed

    def _advance(self, now: float) -> None:
        if not self._now <= now < math.inf:
            raise DemandError(
                f"now is {now} s after {self._now} s; expected finite seconds that never go back: "
                "use one monotonic clock throughout"
            )
        self._now = now
