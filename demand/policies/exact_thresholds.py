"""Thresholds on ranks and on service, exact in floating point.

Where does a rank exceed a threshold (`Policy.next_above`)? A policy that computes its rank from
another one, or that counts service in whole quanta, answers exactly with these.
"""

import math
from collections.abc import Callable

from demand.policies.base import Rank


def just_below(rank: Rank) -> Rank:
    """The greatest rank under `rank`: to exceed it is to reach `rank`."""
    if not isinstance(rank, tuple):
        return math.nextafter(rank, -math.inf)
    *classes, last = rank
    if last > -math.inf or not classes:
        return (*classes, math.nextafter(last, -math.inf))
    below = just_below(tuple(classes))
    assert isinstance(below, tuple)
    return (*below, math.inf)


def half_way(rank: Rank, best: Rank) -> Rank:
    """A threshold between `rank` and a greater `best`, or `best` where no number lies between.

    Of tuples of different classes it is the end of the class of `rank`.
    """
    if not isinstance(rank, tuple) and not isinstance(best, tuple):
        middle = rank + (best - rank) / 2
        return middle if rank <= middle < best else best  # a large int may round below `rank`
    assert isinstance(rank, tuple)
    assert isinstance(best, tuple)
    if rank[:-1] != best[:-1]:
        return (*rank[:-1], math.inf)
    last = half_way(rank[-1], best[-1])
    assert not isinstance(last, tuple)
    return (*rank[:-1], last)


def greatest_addend(other: float, threshold: float) -> float:
    """The greatest x with x + other <= threshold, in floating point; `threshold` if infinite.

    Sums up to half-way to the next number over `threshold` round to it. x computed by algebra is
    off by a rounding or two, which the steps of the search make up for.
    """
    if not math.isfinite(threshold):
        return threshold
    above = math.nextafter(threshold, math.inf)
    ulp = above - threshold if above < math.inf else math.ulp(threshold)
    x = threshold - other + ulp / 2
    while x + other > threshold:
        x = math.nextafter(x, -math.inf)
    while True:
        above = math.nextafter(x, math.inf)
        if above + other > threshold or above == x:
            return x
        x = above


def greatest_within(function: Callable[[float], float], threshold: float, guess: float) -> float:
    """The greatest x with function(x) <= threshold, for a function that never falls.

    A rank computed from an inner rank exceeds `threshold` exactly when the inner rank exceeds
    this; `guess`, the same by algebra, may be off by the rounding of the function.
    """
    if math.isinf(guess):
        return guess
    step = math.ulp(threshold) + math.ulp(guess)
    low, high = guess - step, guess + step
    while function(low) > threshold:
        low -= guess - low
    while function(high) <= threshold:
        high += high - guess
    while True:
        middle = low + (high - low) / 2
        if middle in (low, high):
            return low
        if function(middle) <= threshold:
            low = middle
        else:
            high = middle


# Service counted in whole quanta, so that jobs of equal rank do not swap at every instant.

ROUNDING = 1e-9
"""A sum of pieces of service that falls this share of a quantum short of a whole number of quanta
counts as that number: 0.1 + 0.2 + ... is what it was meant to be."""


def whole_quanta(seconds: float, quantum: float) -> int:
    """How many quanta of `quantum` seconds are complete within `seconds`, up to `ROUNDING`."""
    return math.floor(seconds / quantum + ROUNDING)


def next_quantum_end(seconds: float, quantum: float, threshold: float) -> float:
    """The least end of a quantum, after `seconds`, that exceeds `threshold`."""
    if threshold == math.inf:
        return math.inf
    count = whole_quanta(seconds, quantum) + 1
    if count * quantum <= threshold:
        count = math.floor(threshold / quantum)
        while count * quantum <= threshold:
            count += 1
    return count * quantum
