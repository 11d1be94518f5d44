"""The lower convex hulls behind the Gittins ranks of all ages."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from demand.seconds import Floats

Ints = NDArray[np.int64]


class Tails(NamedTuple):
    """Ages x_0 = 0 < x_1 < ... < x_n, P(X > x_i) and E[(X - x_i)+], summed from the tail.

    x_1 ... x_n are the atoms. Those whose weight is lost to rounding in the sum are left out, so
    that `survival` falls strictly, to 0; `excess` falls strictly to 0 as well.
    """

    ages: Floats
    survival: Floats
    excess: Floats

    @classmethod
    def of(cls, values: Floats, weights: Floats) -> "Tails":
        """For ascending distinct values of positive weight."""
        at_least = np.cumsum(weights[::-1])[::-1]
        survival = np.append(at_least, 0.0)
        ages = np.append(0.0, values)
        if values[0] == 0.0:
            ages, survival = ages[1:], survival[1:]
        kept = np.append(True, survival[1:] < survival[:-1])
        if not kept.all():
            ages, survival = ages[kept], survival[kept]
        areas = np.diff(ages) * survival[:-1]
        return cls(ages, survival, np.append(np.cumsum(areas[::-1])[::-1], 0.0))

    def slopes(self, left: Ints, right: Ints) -> Floats:
        """Expected service per completion between two ages by number, `left` < `right`."""
        return (self.excess[left] - self.excess[right]) / (
            self.survival[left] - self.survival[right]
        )


def tangent_walks(tails: Tails) -> Ints:
    """Walks along the hulls of the points P_k = (F(x_k), A(x_k)), A(y) the integral of 1 - F.

    F and A enter through differences only, so survival and excess stand in for them. The monotone
    chain scan from the right: at i it has the lower hull of P_(i+1) ... P_n, and walks along it
    from P_(i+1) to where the tangent through P_i touches. What it passes is never needed again,
    so all walks together take at most 2 n steps.

    This loop is all of the construction that is not vectorised; it stays with Python's floats.

    Returns:
        The walks of i = n - 1 ... 0, end to end, as numbers of points. Each starts at i + 1 and
        rises, so that a fall marks the start of the next.
    """
    survival, excess = tails.survival.tolist(), tails.excess.tolist()
    number = np.arange(len(survival) - 1)
    slopes = tails.slopes(number, number + 1).tolist()  # from each point to its neighbour
    edge = [math.inf] * len(survival)  # slope from a point to the next one on its suffix's hull
    after = [0] * len(survival)
    walks: list[int] = []
    step = walks.append
    for i in range(len(survival) - 2, -1, -1):
        k, slope = i + 1, slopes[i]
        step(k)
        while slope > edge[k]:
            k = after[k]
            step(k)
            slope = (excess[i] - excess[k]) / (survival[i] - survival[k])
        after[i], edge[i] = k, slope
    return np.fromiter(walks, dtype=np.int64, count=len(walks))
