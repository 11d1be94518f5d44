"""Ranks of all ages as piecewise linear functions: the mean, the exact rank and the bucketed ones.

Between two ages at which the best time to give up changes, a rank is a falling line.
"""

import math
from array import array
from bisect import bisect_right
from typing import final

import numpy as np

from demand.distribution.hull import Hull, Ints, Tails
from demand.distribution.range_sums import LEAST_SHARE, RangeSums
from demand.distribution.rank_variants import BUCKETS, bucket_entries
from demand.seconds import Floats


@final
class Pieces:
    """A piecewise linear function of age: within a piece it falls, between pieces it may jump up.

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
        """Values at `ages` in seconds, any shape, from 0 to below the last end."""
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
    rates = np.ones(len(tails.areas))
    return Pieces(tails.ages[1:], tails.excess[1:] / tails.survival[:-1], rates)


def gittins_pieces(tails: Tails) -> Pieces:
    """Gittins ranks by age, as tangents to a lower convex hull: at most 2 pieces an atom.

    The rank at age a is the least slope from (F(a), A(a)) to a later point P_k, that is, of the
    tangent to the lower hull of the later points. Between x_i and x_(i+1) the query moves straight
    up from P_i, and its tangent point walks back along the hull to P_(i+1), over the points that
    P_i passed over. Each step of that walk is one linear piece: ((x_(i+1) - a) P(X > x_i) +
    A(x_k) - A(x_(i+1))) / (F(x_k) - F(x_i)), up to the age at which it equals the slope of the hull
    edge from the point before.
    """
    ages, weights, survival, _, _ = tails
    hull = Hull.of(tails)
    point, by, served, finished = hull.passed()
    up = hull.slopes[point] * finished - served
    own = np.arange(len(weights))  # the gap of the piece whose tangent point is the end of the gap
    order = np.argsort(
        np.concatenate([by, own]), kind="stable"
    )  # that piece is the last of its gap
    gap = np.concatenate([by, own])[order]
    starts, stops, alive = ages[gap], ages[gap + 1], survival[gap]
    beyond = np.concatenate([served + hull.served[point], np.zeros(own.size)])[order]
    mass = np.concatenate([finished + hull.finished[point], weights])[order]
    ends = stops - np.concatenate([up, np.zeros(own.size)])[order] / alive
    ends = np.maximum(ends, starts)
    ends = np.minimum(ends, stops)
    # Where an end is rounded down, the line that ends there is still the lower one at that age.
    here = (beyond + (stops - ends) * alive) / mass
    behind = (beyond[1:] + (stops[1:] - ends[:-1]) * alive[1:]) / mass[1:]
    lower = np.flatnonzero((here[:-1] < behind * (1.0 - 1e-12)) & (ends[:-1] < stops[:-1]))
    ends[lower] = np.nextafter(ends[lower], math.inf)
    ends = np.minimum.accumulate(ends[::-1])[::-1]  # against rounding
    ranks, rates = (beyond + (stops - ends) * alive) / mass, alive / mass
    kept = np.flatnonzero(ends > np.append(0.0, ends[:-1]))  # pieces without length are dropped
    return Pieces(ends[kept], ranks[kept], rates[kept])


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
    ages, weights, survival, areas, _ = tails
    largest = ages[-1]
    entries = [bucket_entries(ages, bucket) for bucket in range(1, BUCKETS + 1)]
    marks = np.unique(np.concatenate([ages, *entries]))
    marks = marks[(marks >= 0.0) & (marks <= largest)]
    starts, ends = marks[:-1], marks[1:]
    i = ages.searchsorted(starts, side="right") - 1
    gap_left = ages[i + 1] - ends
    served_between, finished_between = RangeSums(areas), RangeSums(weights)
    values = np.full((BUCKETS, starts.size), math.inf)
    rates = np.zeros((BUCKETS, starts.size))
    for row, entry in enumerate(entries):
        k = np.maximum(entry.searchsorted(starts, side="right") - 1, i)
        some = np.flatnonzero(k > i)  # where an atom lies within the stop
        first, k, end, alive = i[some], k[some], ends[some], survival[i[some]]
        done = finished_between(first, k)
        if artifact:  # E[X - a; X - a <= D] alive / done^2
            between = served_between(first + 1, k)
            own = _served_to_completion(tails, between, first, k, end)
            values[row, some] = own * alive / done**2
            rates[row, some] = alive / done
        else:  # E[min(X - a, D)] / done, where a + D = (1 - share) a + share m
            share = (row + 1) / BUCKETS
            served = gap_left[some] * alive + served_between(first + 1, k)
            beyond = share * (largest - ages[k]) - (1.0 - share) * (ages[k] - end)  # a + D - x_k
            values[row, some] = (served + np.maximum(beyond, 0.0) * survival[k]) / done
            rates[row, some] = (done + share * survival[k]) / done
    return _lower_envelope(starts, ends, values, rates)


def _served_to_completion(
    tails: Tails, between: Floats, first: Ints, last: Ints, age: Floats
) -> Floats:
    """`[m]` sums of P(X = x_j) (x_j - age) over first < j <= last, each from its own age on.

    What all jobs are served up to x_last, less what those that live on are; `between` is how much
    of the first is served from x_(first+1) on. Where that would be a difference of two numbers
    that are nearly the same, the sum itself.
    """
    ages, weights, survival, _, _ = tails
    everybody = (ages[first + 1] - age) * survival[first] + between
    sums: Floats = everybody - (ages[last] - age) * survival[last]
    for at in np.flatnonzero(sums < LEAST_SHARE * everybody):
        own = slice(first[at], last[at])
        sums[at] = weights[own] @ (ages[1:][own] - age[at])
    return sums


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
