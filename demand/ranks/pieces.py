"""Functions of age that fall within pieces and may jump up between them."""

from array import array
from bisect import bisect_right
from typing import final

import numpy as np

from demand.atoms import Floats
from demand.ranks.hull import Tails, tangent_walks


@final
class Pieces:
    """A piecewise linear function of age; within a piece it falls.

    A piece is kept by its end: value(age) = end_value + rate * (end - age), a sum of terms that
    are not negative, so that no rank is rounded below 0.

    Args:
        ends: `[p]` seconds, ascending; the first piece starts at age 0.
        end_values: `[p]` value just before each end.
        rates: `[p]` loss of value per second.
    """

    __slots__ = ("_end_list", "_end_value_array", "_end_values", "_ends", "_rate_array", "_rates")

    def __init__(self, ends: Floats, end_values: Floats, rates: Floats) -> None:
        self._ends, self._end_values, self._rates = ends, end_values, rates
        # One age at a time, bisection on a list beats numpy several times over. What is then read
        # once stays in C doubles, a quarter of the memory.
        self._end_list = ends.tolist()
        self._end_value_array = array("d", end_values.tobytes())
        self._rate_array = array("d", rates.tobytes())

    def __len__(self) -> int:
        return self._ends.size

    def __call__(self, ages: Floats) -> Floats:
        """Values at `ages`, any shape, from 0 to below the last end."""
        at = self._ends.searchsorted(ages, side="right")
        return self._end_values[at] + self._rates[at] * (self._ends[at] - ages)

    def at(self, age: float) -> float:
        """The same number for one age, without numpy's overhead."""
        i = bisect_right(self._end_list, age)
        return self._end_value_array[i] + self._rate_array[i] * (self._end_list[i] - age)

    def jumps(self) -> tuple[Floats, Floats]:
        """Ages after 0 at which the function rises, by more than rounding, and its values there."""
        starts = self._ends[:-1]
        values = self._end_values[1:] + self._rates[1:] * (self._ends[1:] - starts)
        rises = values > self._end_values[:-1] * (1.0 + 1e-12)
        return starts[rises], values[rises]


def mean_pieces(tails: Tails) -> Pieces:
    """E[X - a | X > a] by age: one piece to each gap between atoms."""
    ages, survival, excess = tails
    return Pieces(ages[1:], excess[1:] / survival[:-1], np.ones(len(ages) - 1))


def gittins_pieces(tails: Tails) -> Pieces:
    """Gittins ranks by age, as tangents to a lower convex hull: at most 2 pieces an atom.

    The rank at age a is the least slope from (F(a), A(a)) to a later point P_k, that is, of the
    tangent to the lower hull of the later points. Between x_i and x_(i+1) the query moves straight
    up from P_i, and its tangent point walks back along the hull to P_(i+1): `tangent_walks` in
    reverse. Each step of a walk is one linear piece, and the rank where two pieces meet is the
    slope of the hull edge between their points.
    """
    ages, survival, excess = tails
    touched = tangent_walks(tails)
    starts_walk = np.diff(touched, prepend=len(ages)) < 0
    i = len(ages) - 1 - np.cumsum(starts_walk)
    alive = survival[i]
    # The walk starts with P_(i+1) itself, where the query arrives at the end of the gap.
    ends, end_ranks = ages[i + 1], np.zeros(touched.size)
    later = np.flatnonzero(~starts_walk)
    passed = touched[later - 1]
    edges = tails.slopes(passed, touched[later])
    up = excess[passed] + edges * (alive[later] - survival[passed]) - excess[i[later] + 1]
    ends[later] = np.maximum(ends[later] - up / alive[later], ages[i[later]])
    end_ranks[later] = edges
    # Walks run to ever smaller ages, and so does each walk. Pieces without length are dropped.
    ends = np.minimum.accumulate(ends)  # against rounding
    starts = np.append(ends, 0.0)[1:]
    kept = np.flatnonzero(starts < ends)[::-1]
    return Pieces(ends[kept], end_ranks[kept], (alive / (alive - survival[touched]))[kept])
