"""The engine of the best score: prefix, queue and KV in use, weighed against each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from typing_extensions import override

from demand.errors import DemandError
from demand.routing.base import ReadyUnit, Router, SeenEngine
from demand.seconds import one_number


@final
@dataclass(frozen=True)
class WeightedScores(Router):
    """Each unit goes to the engine of the greatest weighted sum of three scores from 0 to 1.

    They are the share of its prompt tokens that is found there; the place of the engine's queue
    between the longest (0) and the shortest (1), 1 for all where they are equal; and the share of
    its KV blocks that no request holds. So llm-d's scheduler adds up its scorers for prefixes,
    queue depth and KV utilisation. The weights are ours: deployments of llm-d set their own.
    Departures: all is as of the very second, and among equals the smallest number goes.

    Args:
        prefix: weight of what is found.
        queue: weight of the queue.
        kv: weight of the free KV.

    Raises:
        DemandError: a weight that is negative or not finite, or no weight above 0.
    """

    prefix: float = 3.0
    queue: float = 1.0
    kv: float = 1.0

    def __post_init__(self) -> None:
        for name in ("prefix", "queue", "kv"):
            weight = one_number(name, getattr(self, name))
            if not 0.0 <= weight < math.inf:
                raise DemandError(f"{name} is {weight}; expected a finite weight of at least 0")
            object.__setattr__(self, name, weight)
        if not self.prefix + self.queue + self.kv > 0.0:
            raise DemandError(
                "prefix, queue and kv are all 0, so that all engines score alike; give one of them "
                "a weight, or RandomEngine()"
            )

    @override
    def choose(self, unit: ReadyUnit, engines: Sequence[SeenEngine], state: Any) -> int:
        queues = [engine.waiting for engine in engines]
        longest, span = max(queues), max(queues) - min(queues)
        scores = []
        for engine, waiting in zip(engines, queues, strict=True):
            found = engine.found_tokens(unit) / unit.prompt_tokens if self.prefix else 0.0
            free = 1.0 - engine.kv_share if self.kv else 0.0
            short = (longest - waiting) / span if span else 1.0
            scores.append(self.prefix * found + self.queue * short + self.kv * free)
        return scores.index(max(scores))
