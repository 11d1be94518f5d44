"""The engine that has the KV of the run, unless it has too much to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from typing_extensions import override

from demand.routing.base import ReadyUnit, Router, SeenEngine
from demand.routing.load import LOADS, Load, check_load, checked_bound, least_loaded


@final
@dataclass(frozen=True)
class PrefixAffinity(Router):
    """Each unit goes where most of its prompt is found, unless that engine is loaded too much.

    Too much is more than `bound` above the least loaded engine, which then serves the unit; so does
    it where nothing is found: a run's first call, or one whose KV was given up. Among engines where
    as much is found the one that served the run last goes first, then the smallest number.

    That sessions stay with their KV as long as the load allows is the idea of SAGA (arXiv
    2605.00528, session affinity with work stealing, known here by its abstract), and of the scorer
    of llm-d that knows which blocks each engine has. Departures: what is found is what the engine
    would find at that second, prefixes of other runs not included; load is bounded as a unit is
    routed, and what waits is not taken away from an engine again.

    Args:
        bound: load that the engine with the KV may have beyond the least; 0 for no more than
            anyone, infinity for affinity at any price.
        by: the measure of load (`SeenEngine`).

    Raises:
        DemandError: a bound that is negative or no number, or an unknown measure.
    """

    bound: float = 16.0
    by: Load = "requests"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bound", checked_bound(self.bound, f"{self.by} beyond the least"))
        check_load(self.by)

    @override
    def choose(self, unit: ReadyUnit, engines: Sequence[SeenEngine], state: Any) -> int:
        load = LOADS[self.by]
        least = least_loaded(engines, self.by)
        found = [engine.found_tokens(unit) for engine in engines]
        most = max(found)
        if not most:
            return least.number
        at = unit.last if unit.last is not None and found[unit.last] == most else found.index(most)
        return at if load(engines[at]) - load(least) <= self.bound else least.number
