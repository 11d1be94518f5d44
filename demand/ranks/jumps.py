"""Where a rank rises: the first age at which it exceeds a threshold."""

import math
from bisect import bisect_right
from typing import final

import numpy as np

from demand.atoms import Floats


@final
class Jumps:
    """Ages at which a rank jumps up, searched by value through a tree of maxima.

    Args:
        ages: `[n]` seconds, ascending.
        ranks: `[n]` ranks there.
    """

    __slots__ = ("_ages", "_leaves", "_maxima", "_number")

    def __init__(self, ages: Floats, ranks: Floats) -> None:
        self._number = ages.size
        self._leaves = 1 << ages.size.bit_length()  # more than n: the last leaf stops every search
        self._ages = [*ages.tolist(), math.inf]
        level = np.full(self._leaves, math.inf)
        level[: ages.size] = ranks
        maxima = [level]
        while level.size > 1:
            level = np.maximum(level[::2], level[1::2])
            maxima.append(level)
        # Node 1 is the root, 2 k and 2 k + 1 are the children of k.
        self._maxima = np.concatenate([[math.inf], *maxima[::-1]]).tolist()

    def __len__(self) -> int:
        return self._number

    def first_above(self, age: float, threshold: float) -> float:
        """Least jump age after `age` whose rank exceeds a finite threshold; infinity if none."""
        maxima, leaves = self._maxima, self._leaves
        node = bisect_right(self._ages, age) + leaves
        while maxima[node] <= threshold:
            node += 1
            if not node & 1:
                node >>= 1
        while node < leaves:
            node <<= 1
            if maxima[node] <= threshold:
                node += 1
        return self._ages[min(node - leaves, self._number)]
