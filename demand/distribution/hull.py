"""The lower convex hulls behind the Gittins ranks of all ages.

A demand may span 30 decades: seconds from nanoseconds to ages of the universe, probabilities down
to any size. So nothing here is the difference of two running sums, of which only rounding would be
left where the one is far larger than the other. Every number is a sum of positive terms over just
the atoms it is about, and as exact as its terms.
"""

import math
from array import array
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from demand.seconds import Floats

Ints = NDArray[np.int64]


class Tails(NamedTuple):
    """Ages x_0 = 0 < x_1 < ... < x_n, x_1 ... x_n the atoms, and what lies beyond each of them.

    Attributes:
        ages: `[n + 1]` x_i in seconds.
        weights: `[n]` P(X = x_(i+1)).
        survival: `[n + 1]` P(X > x_i), falling to 0.
        areas: `[n]` seconds that a job is expected to be served between x_i and x_(i+1):
            (x_(i+1) - x_i) P(X > x_i).
        excess: `[n + 1]` E[(X - x_i)+] in seconds: the sum of the areas from x_i on.
    """

    ages: Floats
    weights: Floats
    survival: Floats
    areas: Floats
    excess: Floats

    @classmethod
    def of(cls, values: Floats, weights: Floats) -> "Tails":
        """For ascending distinct values of positive weight."""
        survival = np.append(np.cumsum(weights[::-1])[::-1], 0.0)
        if values[0] == 0.0:
            ages, survival, weights = values, survival[1:], weights[1:]
        else:
            ages = np.append(0.0, values)
        areas = np.diff(ages) * survival[:-1]
        excess = np.append(np.cumsum(areas[::-1])[::-1], 0.0)
        return cls(ages, weights, survival, areas, excess)


class Passed(NamedTuple):
    """Points that the hull of a longer suffix passes over, each at most once.

    Attributes:
        points: `[m]` numbers k.
        by: `[m]` number i of the point whose hull is the first that goes over P_k; ascending, and
            for one i the points from right to left.
        served: `[m]` A(x_k) - A(x_(i+1)), seconds.
        finished: `[m]` F(x_k) - F(x_i), a probability.
    """

    points: Ints
    by: Ints
    served: Floats
    finished: Floats


class Hull(NamedTuple):
    """The lower hull of the points P_i ... P_n for every i, and how the one is made of the next.

    P_k = (F(x_k), A(x_k)), with F the distribution function and A(y) the integral of 1 - F up to y,
    so that the slope from P_i to P_k is the expected service per completion of who starts at age
    x_i and gives up at x_k. The hulls form a tree: each point has one next point on the hull of
    its suffix, whatever the suffix that the hull begins with.

    Attributes:
        after: `[n + 1]` number of the next point; n for P_n itself.
        served: `[n + 1]` seconds expected from a point to its next, A(x_after) - A(x_i).
        finished: `[n + 1]` probability to finish between the two, F(x_after) - F(x_i).
        slopes: `[n + 1]` the one over the other; infinity for P_n.
        passes: for each point the first that goes over it, or n, and what `Passed` says of it.
    """

    after: Ints
    served: Floats
    finished: Floats
    slopes: Floats
    passes: tuple[list[int], list[float], list[float]]

    @classmethod
    def of(cls, tails: Tails) -> "Hull":
        """The monotone chain scan, from the right.

        At i it has the hull of P_(i+1) ... P_n, and walks along it from P_(i+1) to where the
        tangent through P_i touches, adding up what the edges that it passes are made of. What it
        passes is never needed again, so all walks together take at most n steps.

        This loop is all of the construction that is not vectorised; it stays with Python's floats.
        """
        areas, weights = tails.areas.tolist(), tails.weights.tolist()
        n = len(areas)
        after, slopes = [*range(1, n + 1), n], [*(tails.areas / tails.weights).tolist(), math.inf]
        served, finished = [*areas, 0.0], [*weights, 0.0]
        by, served_before, finished_before = [n] * (n + 1), [0.0] * (n + 1), [0.0] * (n + 1)
        edge = math.inf  # slopes[k], k being the point to which i may be joined
        for i in range(n - 1, -1, -1):
            slope = slopes[i]
            if slope > edge:
                k, area, beyond, mass = i + 1, areas[i], 0.0, weights[i]
                while slope > edge:
                    by[k] = i
                    served_before[k] = beyond
                    finished_before[k] = mass
                    beyond += served[k]
                    mass += finished[k]
                    k = after[k]
                    edge = slopes[k]
                    slope = (area + beyond) / mass
                slopes[i] = slope
                served[i] = area + beyond
                finished[i] = mass
                after[i] = k
            edge = slope
        return cls(
            np.frombuffer(array("q", after), np.int64),
            np.frombuffer(array("d", served)),
            np.frombuffer(array("d", finished)),
            np.frombuffer(array("d", slopes)),
            (by, served_before, finished_before),
        )

    def passed(self) -> Passed:
        """The points that some hull passes over."""
        by, *columns = self.passes
        over = np.frombuffer(array("q", by), np.int64)
        points = np.flatnonzero(over < len(by) - 1)
        points = points[np.argsort(over[points] * len(by) - points)]
        served, finished = (np.frombuffer(array("d", column))[points] for column in columns)
        return Passed(points, over[points], served, finished)
