"""The baselines that planners are compared with, from no prewarming to an oracle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from demand.distribution.distribution import Distribution
from demand.prewarm.base import Knowledge, Prewarmer, Start, Successor, fitting


@final
@dataclass(frozen=True)
class NoPrewarm(Prewarmer):
    """Warms nothing ahead: a backend is warmed when the engine comes to serve its unit.

    What then stays warm is up to the pool. With one that keeps what was used this is the LRU
    baseline of Hermes; with one that keeps nothing every use is a cold start.
    """

    @property
    @override
    def at_submission(self) -> bool:
        return False

    @property
    @override
    def knows(self) -> Knowledge:
        return "nothing"

    @override
    def plan(
        self, remaining: Distribution, successors: Sequence[Successor], capacity: float
    ) -> list[Start]:
        return []


@final
@dataclass(frozen=True)
class WaitingQueue(Prewarmer):
    """Warms for units that wait in the queue of the engine (EPWQ in Hermes), not for later ones.

    It helps units that have a queue to wait in: a LoRA adapter is loaded while the request waits
    for its turn. A container or a model called right after another unit has none.
    """

    @override
    def plan(
        self, remaining: Distribution, successors: Sequence[Successor], capacity: float
    ) -> list[Start]:
        return []


@final
@dataclass(frozen=True)
class AlwaysAtStart(Prewarmer):
    """Warms for every possible successor as soon as the current unit starts."""

    @override
    def plan(
        self, remaining: Distribution, successors: Sequence[Successor], capacity: float
    ) -> list[Start]:
        """Start all that fit at once, the likelier first."""
        likely = sorted(
            (s for s in successors if s.probability > 0.0), key=lambda s: -s.probability
        )
        return [start for start, _ in fitting([(Start(s.unit, 0.0), s) for s in likely], capacity)]


@final
@dataclass(frozen=True)
class OraclePrewarm(Prewarmer):
    """Knows the unit that follows and what is left of the current one, and is just in time.

    It cannot know how the engine's batches will grow or preempt: it takes the current unit to go on
    at the `pace` that `simulate_engine` is told.
    """

    @property
    @override
    def knows(self) -> Knowledge:
        return "truth"

    @override
    def plan(
        self, remaining: Distribution, successors: Sequence[Successor], capacity: float
    ) -> list[Start]:
        """Start the one that follows so that its warm-up ends with the current unit."""
        certain = [s for s in successors if s.probability == 1.0 and s.footprint <= capacity]
        end = float(remaining.values[-1])
        return [Start(s.unit, max(0.0, end - s.warm_seconds)) for s in certain[:1]]
