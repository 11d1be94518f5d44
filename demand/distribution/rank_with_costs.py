"""Gittins ranks of all ages with a minimum quantum and a preemption cost."""

import math
from array import array
from bisect import bisect_right
from typing import final

import numpy as np
from numpy.typing import NDArray

from demand.distribution.hull import Ints, Tails, tangent_walks
from demand.seconds import Floats


@final
class CostedRanks:
    """G(a) = inf over D >= q of (c + E[min(X - a, D) | X > a]) / P(X - a <= D | X > a), by search.

    The best D is q, or reaches an atom beyond a + q. With E(y) the excess E[(X - y)+] and S
    survival, D = q gives (E(a) - E(a + q) + c S(a)) / (S(a) - S(a + q)); the best atom k has the
    least slope (E(a) + c S(a) - E_k) / (S(a) - S_k), the tangent from a point below the curve to
    the lower hull of the atoms beyond a + q. The hulls of all suffixes form a tree (each point
    has one next point, whatever suffix it starts), so the tangent is found by doubling steps
    along it: O(log n) for one age, and less for random samples, whose hulls have few points. The
    walks between two atoms overlap, unlike those without quantum and cost, which is why the
    pieces are not listed.

    Between two atoms the rank falls; it jumps up at an atom that the job survives.
    """

    def __init__(self, tails: Tails, quantum: float, preemption_cost: float) -> None:
        self._tails, self._quantum, self._cost = tails, quantum, preemption_cost
        last = len(tails.ages) - 1
        after = np.full(last + 1, last, dtype=np.int64)
        walks = tangent_walks(tails)
        after[:-1] = walks[np.diff(walks, append=0) < 0][::-1]  # where the walk of a point ends
        edges = np.full(last + 1, math.inf)
        edges[:-1] = tails.slopes(np.arange(last), after[:-1])
        self._edges = edges
        hops = [after]
        while (hops[-1] != last).any():
            hops.append(hops[-1][hops[-1]])
        self._hops = hops[::-1]  # longest first
        self._lists = (*(column.tolist() for column in tails), edges.tolist())
        self._hop_lists = [array("q", hop.tobytes()) for hop in self._hops]

    def __call__(self, ages: Floats) -> Floats:
        """Ranks at `ages`, any shape, from 0 to below the largest atom."""
        x, survival, excess = self._tails
        last = len(x) - 1
        i = x.searchsorted(ages, side="right") - 1
        alive = survival[i]
        area = excess[i + 1] + (x[i + 1] - ages) * alive + self._cost * alive
        reach = ages + self._quantum
        j = x.searchsorted(reach, side="right") - 1
        k = np.minimum(j + 1, last)
        rest = excess[k] + np.maximum(x[k] - reach, 0.0) * survival[j]
        done = alive - survival[j]
        at_quantum = np.where(j > i, (area - rest) / np.where(j > i, done, 1.0), math.inf)
        passed = self._steep(area, alive, k)
        for hop in self._hops:
            ahead = hop[k]
            k = np.where(passed & self._steep(area, alive, ahead), ahead, k)
        k = np.where(passed, self._hops[-1][k], k)
        return np.minimum(at_quantum, (area - excess[k]) / (alive - survival[k]))

    def at(self, age: float) -> float:
        """The same number for one age, without numpy's overhead."""
        x, survival, excess, edges = self._lists
        i = bisect_right(x, age) - 1
        alive = survival[i]
        area = excess[i + 1] + (x[i + 1] - age) * alive + self._cost * alive
        k, at_quantum = i + 1, math.inf
        if self._quantum:
            reach = age + self._quantum
            j = bisect_right(x, reach) - 1
            k = min(j + 1, len(x) - 1)
            if j > i:
                rest = excess[k] + max(x[k] - reach, 0.0) * survival[j]
                at_quantum = (area - rest) / (alive - survival[j])
        slope = (area - excess[k]) / (alive - survival[k])
        if slope > edges[k]:
            for hop in self._hop_lists:
                ahead = hop[k]
                if (area - excess[ahead]) / (alive - survival[ahead]) > edges[ahead]:
                    k = ahead
            k = self._hop_lists[-1][k]
            slope = (area - excess[k]) / (alive - survival[k])
        return min(at_quantum, slope)

    def _steep(self, area: Floats, alive: Floats, k: Ints) -> NDArray[np.bool_]:
        """Whether the tangent point lies beyond point `k`."""
        excess, survival = self._tails.excess[k], self._tails.survival[k]
        return np.asarray((area - excess) / (alive - survival) > self._edges[k])
