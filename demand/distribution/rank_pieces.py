"""Functions of age that fall within pieces and may jump up between them."""

import math
from array import array
from bisect import bisect_right
from typing import final

import numpy as np

from demand.distribution.hull import Tails, tangent_walks
from demand.distribution.rank_variants import BUCKETS, bucket_entries
from demand.seconds import Floats


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


def bucketed_pieces(tails: Tails) -> Pieces:
    """`bucketed_rank` by age."""
    return _bucket_pieces(tails, artifact=False)


def hermes_artifact_pieces(tails: Tails) -> Pieces:
    """`hermes_artifact_rank` by age."""
    return _bucket_pieces(tails, artifact=True)


def _bucket_pieces(tails: Tails, artifact: bool) -> Pieces:
    """Between two ages at which an atom is passed or comes within a stop, every term is linear.

    The stops D = j (m - a) / 10 shrink as the age grows, so that atoms enter them: there are up to
    11 n such ages, and up to 10 pieces between two of them.
    """
    ages, survival, excess = tails
    largest = ages[-1]
    entries = [bucket_entries(ages, bucket) for bucket in range(1, BUCKETS + 1)]
    marks = np.unique(np.concatenate([ages, *entries]))
    marks = marks[(marks >= 0.0) & (marks <= largest)]
    starts, ends = marks[:-1], marks[1:]
    i = ages.searchsorted(starts, side="right") - 1
    alive = survival[i]
    left = excess[i + 1] + (ages[i + 1] - ends) * alive  # E[(X - end)+]
    values = np.full((BUCKETS, starts.size), math.inf)
    rates = np.zeros((BUCKETS, starts.size))
    for row, entry in enumerate(entries):
        k = np.maximum(entry.searchsorted(starts, side="right") - 1, i)
        some = np.flatnonzero(k > i)
        k, here, end = k[some], alive[some], ends[some]
        done = here - survival[k]
        if artifact:  # E[X - a; X - a <= D] alive / done^2
            served = left[some] - excess[k] - (ages[k] - end) * survival[k]
            values[row, some] = served * here / done**2
            rates[row, some] = here / done
        else:  # E[min(X - a, D)] / done, where a + D = (1 - share) a + share m
            share = (row + 1) / BUCKETS
            reach = (1.0 - share) * end + share * largest
            values[row, some] = (left[some] - excess[k] + (reach - ages[k]) * survival[k]) / done
            rates[row, some] = (here - (1.0 - share) * survival[k]) / done
    return _lower_envelope(starts, ends, np.maximum(values, 0.0), rates)


def _lower_envelope(starts: Floats, ends: Floats, values: Floats, rates: Floats) -> Pieces:
    """Least of the lines `values[j] + rates[j] * (end - age)` within each gap, as pieces.

    Walks back from the end of all gaps at once: the least line there, then at each meeting the
    line that is less steep, until none meets before the start.
    """
    gap = np.arange(ends.size)
    at = ends
    line = np.lexsort((rates, values), axis=0)[0]
    found = [(ends[:0], ends[:0], ends[:0])]
    while gap.size:
        back = ends[gap] - at
        value, rate = values[line, gap], rates[line, gap]
        found.append((at, value + rate * back, rate))
        slower = rates[:, gap] < rate
        with np.errstate(divide="ignore", invalid="ignore"):
            meets = (values[:, gap] - value) / (rate - rates[:, gap])
        meets = np.where(slower, meets, math.inf)
        line = meets.argmin(axis=0)
        at = ends[gap] - np.maximum(meets.min(axis=0), back)
        more = at > starts[gap]
        gap, line, at = gap[more], line[more], at[more]
    columns = np.concatenate([np.array(part) for part in found], axis=1)
    # Of pieces with the same end the last found is the least below it; the others have no length.
    order = np.lexsort((-np.arange(columns.shape[1]), columns[0]))
    columns = columns[:, order]
    kept = np.diff(columns[0], prepend=-1.0) > 0.0
    return Pieces(*np.ascontiguousarray(columns[:, kept]))
