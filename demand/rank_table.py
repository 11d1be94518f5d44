"""Ranks for all ages at once: piecewise linear in age, with O(n) pieces for n atoms."""

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import final

import numpy as np
from numpy.typing import ArrayLike

from demand.atoms import RESOLUTION_SECONDS, Floats, beyond_samples, check_age
from demand.distribution import Distribution
from demand.errors import DemandError

Pieces = list[tuple[float, float, float]]
"""(end of the piece in seconds of age, rank there, loss of rank per second), latest first."""


@final
class RankTable:
    """The rank of a job as a function of its age, exact at every age and fast to evaluate.

    Between two atoms a rank only falls; at an atom that the job survives it jumps up. A piece is
    kept by its end: rank(age) = rank_at_end + rate * (end - age), a sum of terms that are not
    negative, so that no rank is rounded to 0 or below.

    Args:
        distribution: total demand of the job in seconds.
        rank: `"gittins"` (see `demand.gittins.gittins_rank`) or `"mean"`, the mean remaining
            demand E[X - age | X > age], which is what SERPT serves by.

    Raises:
        DemandError: an unknown `rank`.
    """

    def __init__(self, distribution: Distribution, rank: str = "gittins") -> None:
        if rank not in _BUILDERS:
            raise DemandError(f"rank is {rank!r}; expected one of {', '.join(_BUILDERS)}")
        self._rank = rank
        values = distribution.values
        self._largest = float(values[-1])
        self._base = max(self._largest, RESOLUTION_SECONDS)
        pieces = _BUILDERS[rank](*_tail_sums(distribution))[::-1]
        columns = np.array(pieces, dtype=np.float64).reshape(-1, 3)
        self._ends, self._end_ranks, self._rates = np.ascontiguousarray(columns.T)
        self._jump_ages = values
        self._jump_ranks = np.append(self(values[:-1]), beyond_samples(self._largest, values[-1:]))
        # One age at a time, bisection on lists beats numpy several times over.
        self._end_list = self._ends.tolist()
        self._end_rank_list = self._end_ranks.tolist()
        self._rate_list = self._rates.tolist()
        self._jump_age_list = self._jump_ages.tolist()
        self._jump_rank_list = self._jump_ranks.tolist()

    def __call__(self, ages: ArrayLike) -> Floats:
        """Ranks in seconds of jobs of the given ages in seconds, any shape; smaller goes first.

        Raises:
            DemandError: an age that is negative or not finite.
        """
        age = np.asarray(ages, dtype=np.float64)
        bad = ~((age >= 0.0) & np.isfinite(age))
        if bad.any():
            check_age(age[bad].flat[0])
        beyond = age >= self._largest
        if not self._ends.size:
            return beyond_samples(self._largest, age)
        at = np.minimum(np.searchsorted(self._ends, age, side="right"), self._ends.size - 1)
        inside = self._end_ranks[at] + self._rates[at] * (self._ends[at] - age)
        return np.where(beyond, beyond_samples(self._largest, np.where(beyond, age, 1.0)), inside)

    def at(self, age: float) -> float:
        """Rank of one age: the same number as `self(age)`, without numpy's overhead."""
        if not age < self._largest:
            return float(beyond_samples(self._largest, check_age(age)))
        if age < 0.0:
            check_age(age)
        i = bisect_right(self._end_list, age)
        return self._end_rank_list[i] + self._rate_list[i] * (self._end_list[i] - age)

    def next_above(self, age: float, threshold: float) -> float:
        """Least age, from `age` on, at which the rank exceeds `threshold`; infinity if none does.

        Between jumps ranks only fall, so the answer is `age` itself, an atom, or a doubling of
        the largest atom.
        """
        if threshold == math.inf:
            return math.inf
        if self.at(age) > threshold:
            return age
        first = bisect_right(self._jump_age_list, age)
        # Ranks often rise at once, which a few plain comparisons find faster than numpy.
        for k in range(first, min(first + 4, len(self._jump_age_list))):
            if self._jump_rank_list[k] > threshold:
                return self._jump_age_list[k]
        later = self._jump_ranks[first:] > threshold
        if later.size:
            k = int(later.argmax())
            if later[k]:
                return self._jump_age_list[first + k]
        power = math.frexp(threshold / self._base)[1]
        doubled = math.ldexp(self._base, power - 1)  # over the threshold if the ratio rounded up
        return doubled if doubled > max(threshold, age) else math.ldexp(self._base, power)

    def __repr__(self) -> str:
        return (
            f"RankTable({self._rank}, {self._jump_ages.size} atoms, {self._ends.size} pieces, "
            f"rank at age 0 {self.at(0.0):.4g} s)"
        )


def _tail_sums(distribution: Distribution) -> tuple[list[float], list[float], list[float]]:
    """Ages x_i from 0 on, P(X > x_i) and E[(X - x_i)+], summed from the tail for precision."""
    x, w = distribution.values, distribution.weights
    survival = np.append(np.cumsum(w[:0:-1])[::-1], 0.0)
    if x[0] > 0.0:
        x, survival = np.append(0.0, x), np.append(1.0, survival)
    areas = np.diff(x) * survival[:-1]
    excess = np.append(np.cumsum(areas[::-1])[::-1], 0.0)
    return x.tolist(), survival.tolist(), excess.tolist()


def _mean_pieces(x: list[float], survival: list[float], excess: list[float]) -> Pieces:
    return [(x[i + 1], excess[i + 1] / survival[i], 1.0) for i in range(len(x) - 2, -1, -1)]


def _gittins_pieces(x: list[float], survival: list[float], excess: list[float]) -> Pieces:
    """Gittins ranks from tangents to a lower convex hull, right to left.

    With points P_k = (F(x_k), A(x_k)), A(y) the integral of 1 - F up to y, the rank at age a is
    the least slope from (F(a), A(a)) to a later point, that is the tangent to the lower hull of
    the later points. Between atoms i and i + 1 the query moves straight up from P_i, and its
    tangent point walks back along the hull to P_(i+1): through just the vertices that pushing
    P_i onto the hull pops. Each walk step is one linear piece, so there are O(n) in all, and the
    rank where two pieces meet is the slope of the hull edge between their vertices.

    F and A enter only through differences; survival and excess are 1 - F and mean - A.
    """
    pieces: Pieces = []
    hull = [(len(x) - 1, math.inf)]  # vertices, and the slope of the edge to the next one
    for i in range(len(x) - 2, -1, -1):
        alive = survival[i]
        end, end_rank = x[i + 1], 0.0
        while True:
            k, edge = hull[-1]
            stops = alive - survival[k]
            # Weights lost to rounding give no chance to stop: such a vertex is passed at once.
            slope = (excess[i] - excess[k]) / stops if stops > 0.0 else math.inf
            last = len(hull) == 1 or slope <= edge
            start = x[i]
            if not last:
                up = excess[k] + edge * stops - excess[i + 1]
                start = min(max(x[i + 1] - up / alive, x[i]), end)
            if start < end:
                pieces.append((end, end_rank, alive / stops))
            if last:
                break
            hull.pop()
            end, end_rank = start, edge
        hull.append((i, slope))
    return pieces


_BUILDERS: dict[str, Callable[[list[float], list[float], list[float]], Pieces]] = {
    "gittins": _gittins_pieces,
    "mean": _mean_pieces,
}
