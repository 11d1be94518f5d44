"""The engine that has the least to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from typing_extensions import override

from demand.routing.base import ReadyUnit, Router, SeenEngine
from demand.routing.load import Load, check_load, least_loaded


@final
@dataclass(frozen=True)
class LeastLoaded(Router):
    """Each unit goes to the engine of the least load, the smallest number among equals.

    The measures are those of the scorers of llm-d's scheduler: requests in flight ("requests"),
    queue depth ("waiting"), utilisation of the KV cache ("kv_share"), and prompt tokens that are
    still to be computed ("prompt_tokens"). Departures: one measure decides, in place of a weighted
    sum of scores (`WeightedScores`); it is as of the very second, in place of what engines last
    reported; among equals the first goes, not one that is drawn.

    Args:
        by: the measure of load (`SeenEngine`).

    Raises:
        DemandError: an unknown measure.
    """

    by: Load = "requests"

    def __post_init__(self) -> None:
        check_load(self.by)

    @override
    def choose(self, unit: ReadyUnit, engines: Sequence[SeenEngine], state: Any) -> int:
        return least_loaded(engines, self.by).number
