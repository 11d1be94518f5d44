"""What a planner is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from demand.distribution.distribution import Distribution
from demand.prewarm.base import Knowledge, Prewarmer, Start, Successor, fitting


@final
@dataclass(frozen=True)
class NoPrewarm(Prewarmer):
    """Backends are warmed when their unit's turn has come; what stays warm is up to the pool.

    With a pool that keeps what was used this is the LRU baseline of Hermes, with one that keeps
    nothing every use is a cold start.
    """

    @property
    def at_submission(self) -> bool:
        """Not even then."""
        return False

    @property
    def knows(self) -> Knowledge:
        """It does not plan."""
        return "nothing"

    def plan(
        self, remaining: Distribution, successors: Sequence[Successor], capacity: float
    ) -> list[Start]:
        """Nothing."""
        return []


@final
@dataclass(frozen=True)
class WaitingQueue(Prewarmer):
    """Warms for units that wait in the queue of the engine (EPWQ in Hermes), not for later ones.

    It helps units that have a queue to wait in: a LoRA adapter is loaded while the request waits
    for its turn. A container or a model called right after another unit has none.
    """

    def plan(
        self, remaining: Distribution, successors: Sequence[Successor], capacity: float
    ) -> list[Start]:
        """Nothing ahead of submission."""
        return []


@final
@dataclass(frozen=True)
class AlwaysAtStart(Prewarmer):
    """Warms for every possible successor as soon as the current unit starts."""

    def plan(
        self, remaining: Distribution, successors: Sequence[Successor], capacity: float
    ) -> list[Start]:
        """All that fit, the likelier first."""
        likely = sorted(
            (s for s in successors if s.probability > 0.0), key=lambda s: -s.probability
        )
        return [start for start, _ in fitting([(Start(s.unit, 0.0), s) for s in likely], capacity)]


@final
@dataclass(frozen=True)
class OraclePrewarm(Prewarmer):
    """Knows the unit that follows and what is left of the current one, and is just in time.

    What it cannot know is how the engine's batches will grow or preempt: it takes the current unit
    to go on at the pace that the simulator is told of.
    """

    @property
    def knows(self) -> Knowledge:
        """It is told the truth."""
        return "truth"

    def plan(
        self, remaining: Distribution, successors: Sequence[Successor], capacity: float
    ) -> list[Start]:
        """The one that follows, a warm-up before the end."""
        certain = [s for s in successors if s.probability == 1.0 and s.footprint <= capacity]
        end = float(remaining.values[-1])
        return [Start(s.unit, max(0.0, end - s.warm_seconds)) for s in certain[:1]]
