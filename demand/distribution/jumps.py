"""Where a rank rises: the first age at which it exceeds a threshold."""

import math
from bisect import bisect_right
from typing import final

import numpy as np

from demand.seconds import Floats


@final
class Jumps:
    """The ages at which a rank jumps up, to be searched for one over a threshold.

    The first jump of all over a threshold is found by bisection in the running maximum. Where it
    lies before the age in question, the search goes through a tree of maxima, which is built when
    it is first needed: for many tables it never is.

    Args:
        ages: `[n]` seconds, ascending.
        ranks: `[n]` ranks there.
    """

    __slots__ = ("_ages", "_highest", "_ranks", "_tree")

    def __init__(self, ages: Floats, ranks: Floats) -> None:
        self._ranks = ranks
        self._ages = [*ages.tolist(), math.inf]
        self._highest = np.maximum.accumulate(ranks).tolist()  # up to each jump
        self._tree: list[float] = []

    def first_above(self, age: float, threshold: float) -> float:
        """Least jump age after `age` whose rank exceeds a finite threshold; infinity if none."""
        first = bisect_right(self._ages, age)
        found = bisect_right(self._highest, threshold)
        return self._ages[found if found >= first else self._search(first, threshold)]

    def _search(self, first: int, threshold: float) -> int:
        """Least number from `first` on of a jump over `threshold`; that of infinity if none."""
        if not self._tree:
            self._tree = _maxima(self._ranks)
        maxima = self._tree
        leaves = len(maxima) // 2
        node = first + leaves
        while maxima[node] <= threshold:
            node += 1
            if not node & 1:
                node >>= 1
        while node < leaves:
            node <<= 1
            if maxima[node] <= threshold:
                node += 1
        return min(node - leaves, self._ranks.size)


def _maxima(ranks: Floats) -> list[float]:
    """Tree of maxima: node 1 is the root, 2 k and 2 k + 1 are the children of k.

    It has more leaves than there are ranks, infinite, so that the last one stops every search.
    """
    level = np.full(1 << ranks.size.bit_length(), math.inf)
    level[: ranks.size] = ranks
    maxima = [level]
    while level.size > 1:
        level = np.maximum(level[::2], level[1::2])
        maxima.append(level)
    found: list[float] = np.concatenate([[math.inf], *maxima[::-1]]).tolist()
    return found
