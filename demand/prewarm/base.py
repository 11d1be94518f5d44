"""What every prewarmer answers to: what may follow the current unit, and what to warm when."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from demand.arguments import check_instance
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.seconds import one_of_seconds

Knowledge = Literal["nothing", "graph", "truth"]


@dataclass(frozen=True, slots=True)
class Successor:
    """A unit that may follow the current one, and what it takes to have its backend warm.

    Args:
        unit: its name.
        probability: that it is the one that follows.
        warm_seconds: duration of its warm-up.
        footprint: what a warm backend occupies, in the unit of the capacity (slots, bytes).

    Raises:
        DemandError: a probability outside [0, 1], a negative or non-finite warm-up, or a
            footprint that is not positive and finite.
    """

    unit: str
    probability: float
    warm_seconds: float
    footprint: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise DemandError(
                f"unit {self.unit!r} follows with probability {self.probability}; expected 0 to 1"
            )
        object.__setattr__(self, "warm_seconds", check_warm_seconds(self.warm_seconds))
        if not 0.0 < self.footprint < math.inf:
            raise DemandError(
                f"footprint of unit {self.unit!r} is {self.footprint}; expected it positive"
            )


@dataclass(frozen=True, slots=True)
class Start:
    """Start to warm the backend of `unit` in `seconds`, if the current unit still runs then."""

    unit: str
    seconds: float


class Prewarmer(ABC):
    """Says when to start warming what may follow, while the current unit is still running.

    A prewarmer is configuration only: a frozen dataclass that is shared freely. It is asked when
    a unit starts, and may be asked again later with what is known by then.
    """

    @property
    def at_submission(self) -> bool:
        """Whether a unit's own backend is warmed as soon as the unit is submitted.

        If not, it is warmed when the engine comes to serve the unit.
        """
        return True

    @property
    def knows(self) -> Knowledge:
        """What it plans by: the demand graph of the application, or the truth of a simulator."""
        return "graph"

    @abstractmethod
    def plan(
        self, remaining: Distribution, successors: Sequence[Successor], capacity: float
    ) -> list[Start]:
        """What to start, and when.

        Args:
            remaining: seconds that the current unit still takes, given how long it has run.
            successors: units that may follow and have a backend; their probabilities add up to
                at most 1, the rest being the end or units without one.
            capacity: what may be occupied for them, in the unit of the footprints.

        Returns:
            At most one start for each successor, the earliest first.
        """


def check_warm_seconds(value: object) -> float:
    """`value` in seconds as a float, or `DemandError` unless a warm-up can take that long."""
    seconds = one_of_seconds("warm_seconds", value)
    if not 0.0 <= seconds < math.inf:
        raise DemandError(f"warm-up takes {value} s; expected finite seconds of at least 0")
    return seconds


def check_prewarmer(name: str, prewarmer: object) -> None:
    """Raise `DemandError` unless `prewarmer` is a prewarmer: an instance, not its class."""
    check_instance(name, prewarmer, Prewarmer, "a prewarmer, such as PrewarmPlanner()")


def fitting(
    starts: Sequence[tuple[Start, Successor]], capacity: float
) -> list[tuple[Start, Successor]]:
    """Those of `starts` that fit into `capacity`, taken one after the other by preference.

    Args:
        starts: the most preferred first.
        capacity: what may be occupied, in the unit of the footprints.
    """
    chosen = []
    for start, successor in starts:
        if successor.footprint <= capacity:
            capacity -= successor.footprint
            chosen.append((start, successor))
    return chosen
