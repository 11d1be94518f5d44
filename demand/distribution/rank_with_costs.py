"""Gittins ranks of all ages with a minimum quantum and a preemption cost."""

import math
from array import array
from bisect import bisect_right
from typing import NamedTuple, final

import numpy as np

from demand.distribution.hull import Hull, Ints, Tails
from demand.distribution.range_sums import RangeSums
from demand.seconds import Floats


class _Hop(NamedTuple):
    """2^m edges of the hull at once: where they lead from each point, and what they add up to."""

    to: Ints
    served: Floats
    finished: Floats

    def twice(self) -> "_Hop":
        """Twice as many edges."""
        to, served, finished = self
        return _Hop(to[to], served + served[to], finished + finished[to])


@final
class CostedRanks:
    """G(a) = inf over D >= q of (c + E[min(X - a, D) | X > a]) / P(X - a <= D | X > a), by search.

    The best D is q, or reaches an atom beyond a + q. To give up at q takes the quotient of
    c S(a) + A(a + q) - A(a) and F(a + q) - F(a), with F the distribution function, S = 1 - F and
    A the integral of S. The best atom k has the least slope (c S(a) + A(x_k) - A(a)) /
    (F(x_k) - F(a)): the tangent from a point below the curve to the lower hull of the atoms beyond
    a + q. The hulls of all suffixes form a tree (`Hull`), so the tangent is found by doubling steps
    along it: O(log n) for one age, and less for random samples, whose hulls have few points. The
    walks between two atoms overlap, unlike those without quantum and cost, which is why the
    pieces are not listed.

    Between two atoms the rank falls; it jumps up at an atom that the job survives.
    """

    def __init__(self, tails: Tails, quantum: float, preemption_cost: float) -> None:
        self._quantum, self._cost = quantum, preemption_cost
        hull = Hull.of(tails)
        hops = [_Hop(hull.after, hull.served, hull.finished)]
        while (hops[-1].to != len(tails.areas)).any():
            hops.append(hops[-1].twice())
        self._hops = hops[::-1]  # longest first
        self._hop_arrays = [
            (array("q", to.tobytes()), array("d", served.tobytes()), array("d", finished.tobytes()))
            for to, served, finished in self._hops
        ]
        # Nothing is served and nobody finishes between the largest atom and the next, of which
        # there is none.
        areas, weights = np.append(tails.areas, 0.0), np.append(tails.weights, 0.0)
        self._served, self._finished = RangeSums(areas), RangeSums(weights)
        self._columns = tails.ages, tails.survival, areas, weights, hull.slopes
        self._lists = tuple(column.tolist() for column in self._columns)

    def __call__(self, ages: Floats) -> Floats:
        """Ranks at `ages`, any shape, from 0 to below the largest atom."""
        return self._ranks(ages.ravel()).reshape(ages.shape)

    def _ranks(self, ages: Floats) -> Floats:
        x, survival, areas, weights, edges = self._columns
        i = x.searchsorted(ages, side="right") - 1
        served = (x[i + 1] - ages + self._cost) * survival[i]
        finished, k, at_quantum = weights[i], i + 1, np.full(ages.size, math.inf)
        if self._quantum:
            j = x.searchsorted(ages + self._quantum, side="right") - 1
            j -= x[j] - ages > self._quantum  # where the sum was rounded up to an atom
            some = np.flatnonzero(j > i)  # within whose quantum there is an atom
            i, j = i[some], j[some]
            served[some] += self._served(i + 1, j)
            finished[some] = self._finished(i, j)
            rest = np.maximum(self._quantum - (x[j] - ages[some]), 0.0) * survival[j]
            at_quantum[some] = (served[some] + rest) / finished[some]
            served[some] += areas[j]
            finished[some] += weights[j]
            k[some] = np.minimum(j + 1, x.size - 1)
        steep = np.flatnonzero(served / finished > edges[k])  # the tangent point lies beyond k
        at, spent, done = k[steep], served[steep], finished[steep]
        for to, more_spent, more_done in self._hops:
            further = (spent + more_spent[at]) / (done + more_done[at]) > edges[to[at]]
            spent = spent + np.where(further, more_spent[at], 0.0)
            done = done + np.where(further, more_done[at], 0.0)
            at = np.where(further, to[at], at)
        _, more_spent, more_done = self._hops[-1]
        served[steep], finished[steep] = spent + more_spent[at], done + more_done[at]
        return np.minimum(at_quantum, served / finished)

    def at(self, age: float) -> float:
        """The same number for one age, without numpy's overhead."""
        x, survival, areas, weights, edges = self._lists
        i = bisect_right(x, age) - 1
        served, finished = (x[i + 1] - age + self._cost) * survival[i], weights[i]
        k, at_quantum = i + 1, math.inf
        if self._quantum:
            j = bisect_right(x, age + self._quantum) - 1
            j -= x[j] - age > self._quantum
            if j > i:
                served += self._served.at(i + 1, j)
                finished = self._finished.at(i, j)
                rest = max(self._quantum - (x[j] - age), 0.0) * survival[j]
                at_quantum = (served + rest) / finished
                served += areas[j]
                finished += weights[j]
                k = min(j + 1, len(x) - 1)
        if served / finished > edges[k]:
            for to, more_served, more_finished in self._hop_arrays:
                then_served, then_finished = served + more_served[k], finished + more_finished[k]
                ahead = to[k]
                if then_served / then_finished > edges[ahead]:
                    served, finished, k = then_served, then_finished, ahead
            _, more_served, more_finished = self._hop_arrays[-1]
            served += more_served[k]
            finished += more_finished[k]
        return min(at_quantum, served / finished)
