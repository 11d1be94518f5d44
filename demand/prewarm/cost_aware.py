"""Start times that weigh the seconds saved against the seconds held for nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from typing_extensions import override

from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.prewarm.base import Prewarmer, Start, Successor, fitting
from demand.seconds import one_number

_ROUNDING = 1e-12
"""Values that differ by less, relative to the warm-up, are taken to be equal."""


@final
@dataclass(frozen=True)
class CostAwarePlanner(Prewarmer):
    """Starts each warm-up where its expected value is largest, and fits the best into capacity.

    Let R be the seconds until the current unit is over, p the probability that the successor
    follows, t its warm-up and f its footprint. A start in s seconds, if s < R,

    - saves min(t, R - s) seconds of waiting, with probability p;
    - holds f for R - s - t seconds, where positive, warm and idle;
    - and if the successor does not follow, has held f for the min(t, R - s) seconds of the
      warm-up, which otherwise would have been spent anyway.

    value(s) = p E[saved] - idle_price * f * E[seconds held for nothing]. It is piecewise linear
    in s with corners at the samples r and at r - t, so that the best of those and 0 is exact.

    Of several successors the set of largest total value that fits the capacity is a knapsack.
    Taken are, of two, the better: the items in order of value per footprint as long as they fit,
    or the most valuable item that fits alone. That is at least half of the largest value, and all
    of it where footprints are equal.

    Args:
        idle_price: seconds of one job's time that a footprint of 1 held for a second is worth.

    Raises:
        DemandError: a price that is negative or not finite.
    """

    idle_price: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "idle_price", one_number("idle_price", self.idle_price))
        if not 0.0 <= self.idle_price < math.inf:
            raise DemandError(
                f"idle_price is {self.idle_price}; expected a finite number of at least 0"
            )

    def value(self, remaining: Distribution, successor: Successor, seconds: float) -> float:
        """Expected value, in seconds of one job's time, of a start in `seconds`."""
        left = np.maximum(remaining.values - seconds, 0.0)
        warming = np.minimum(left, successor.warm_seconds)
        wanted = successor.probability
        saved = wanted * float(remaining.weights @ warming)
        held = float(remaining.weights @ (left - wanted * warming))
        return saved - self.idle_price * successor.footprint * held

    def best_start(self, remaining: Distribution, successor: Successor) -> tuple[float, float]:
        """(seconds, value) of the best start, the latest where several are best."""
        corners = np.append(remaining.values, remaining.values - successor.warm_seconds)
        starts = np.unique(np.append(0.0, corners[corners > 0.0]))
        values = self._values(remaining, successor, starts)
        best = np.flatnonzero(values >= values.max() - _ROUNDING * successor.warm_seconds)[-1]
        return float(starts[best]), float(values[best])

    @override
    def plan(
        self, remaining: Distribution, successors: Sequence[Successor], capacity: float
    ) -> list[Start]:
        """The best start of each successor of the chosen set; those without value are left out."""
        worth = []
        for successor in successors:
            seconds, value = self.best_start(remaining, successor)
            if value > _ROUNDING * successor.warm_seconds and successor.footprint <= capacity:
                worth.append((value, Start(successor.unit, seconds), successor))
        if not worth:
            return []
        dense = sorted(worth, key=lambda item: -item[0] / item[2].footprint)
        taken = {start for start, _ in fitting([item[1:] for item in dense], capacity)}
        greedy = [item for item in worth if item[1] in taken]
        single = max(worth, key=lambda item: item[0])
        chosen = greedy if sum(item[0] for item in greedy) >= single[0] else [single]
        return sorted((start for _, start, _ in chosen), key=lambda start: start.seconds)

    def _values(
        self, remaining: Distribution, successor: Successor, starts: np.ndarray
    ) -> np.ndarray:
        """`value` at each of `starts`, `[s]`, by sums from the tail: O((s + n) log n)."""
        # E[(R - s)+] at any s, from the weight and the mean of the samples above it.
        values, weights = remaining.values, remaining.weights
        weight = np.append(np.cumsum(weights[::-1])[::-1], 0.0)
        moment = np.append(np.cumsum((values * weights)[::-1])[::-1], 0.0)

        def excess(at: np.ndarray) -> np.ndarray:
            above = np.searchsorted(values, at, side="right")
            return moment[above] - at * weight[above]

        left = excess(starts)
        warming = left - excess(starts + successor.warm_seconds)
        wanted = successor.probability
        price = self.idle_price * successor.footprint
        return wanted * warming - price * (left - wanted * warming)
