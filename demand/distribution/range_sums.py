"""Sums of ranges of positive numbers that lose nothing where the numbers span many decades."""

import math
from typing import final

import numpy as np

from demand.distribution.hull import Ints
from demand.seconds import Floats

LEAST_SHARE = 2.0**-12
"""Of a running sum that a difference of two must be, so that at most 12 of 53 bits are lost."""


@final
class RangeSums:
    """Sums of `numbers[first:end]` for any first <= end.

    The difference of two running sums where that is exact enough, and the sum itself where it is
    not: there the range holds next to nothing of what lies to its right.

    Args:
        numbers: `[n]`, positive.
    """

    __slots__ = ("_from", "_from_list", "_numbers")

    def __init__(self, numbers: Floats) -> None:
        self._numbers = np.append(numbers, 0.0)
        self._from = np.append(np.cumsum(numbers[::-1])[::-1], 0.0)  # sum of the numbers from each
        self._from_list: list[float] = self._from.tolist()

    def __call__(self, first: Ints, end: Ints) -> Floats:
        """Sums of ranges, `first` and `end` of one shape `[m]`."""
        begins = self._from[first]
        sums: Floats = begins - self._from[end]
        lost = np.flatnonzero((sums < LEAST_SHARE * begins) & (first < end))
        if lost.size:
            edges = np.column_stack([first[lost], end[lost]]).ravel()
            sums[lost] = np.add.reduceat(self._numbers, edges)[::2]
        return sums

    def at(self, first: int, end: int) -> float:
        """The sum of one range, without numpy's overhead."""
        begins = self._from_list[first]
        difference = begins - self._from_list[end]
        if difference >= LEAST_SHARE * begins or first == end:
            return difference
        return math.fsum(self._numbers[first:end].tolist())
