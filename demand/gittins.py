"""The Gittins rank of one age: the exact vectorised form and its slow, obvious twin."""

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from demand.atoms import Floats, beyond_samples, check_age, clean_atoms


def gittins_rank(values: ArrayLike, weights: ArrayLike | None, age: float) -> float:
    """Exact Gittins rank of a job of the given age; the job with the smaller rank goes first.

    G(a) = inf over D > 0 of E[min(X - a, D) | X > a] / P(X - a <= D | X > a): the least expected
    service per completion over all ways of giving up after D (arXiv 2506.14851, equation of the
    priority; the index of the Gittins literature is 1 / G). For atoms the infimum is attained
    with D at an atom, so one cumulative sum tries them all: O(n log n) with the sort.

    The public Hermes artifact differs: ten equal-width D, and E[X - a | X - a <= D] as numerator,
    which drops the time spent on jobs that do not finish.

    Args:
        values: `[n]` seconds of total demand.
        weights: `[n]`, or `None` for equal weights.
        age: attained service in seconds.

    Returns:
        Seconds, positive. From the largest sample on: `demand.atoms.beyond_samples`.

    Raises:
        DemandError: as `Distribution`, and for an age that is negative or not finite.
    """
    return rank_of_sorted(*clean_atoms(values, weights), check_age(age))


def rank_of_sorted(values: Floats, weights: Floats, age: float) -> float:
    """`gittins_rank` for ascending distinct values with positive weights, unchecked."""
    first = int(np.searchsorted(values, age, side="right"))
    if first == values.size:
        return float(beyond_samples(values[-1], age))
    gain = values[first:] - age
    weight = weights[first:]
    finished = np.cumsum(weight)
    unfinished = finished[-1] - finished
    spent = np.cumsum(weight * gain) + gain * unfinished
    return float(np.min(spent / finished))


def gittins_brute_force(values: ArrayLike, weights: ArrayLike | None, age: float) -> float:
    """Slow twin of `gittins_rank`, straight from the definition: every D at and between atoms."""
    x, w = clean_atoms(values, weights)
    age = check_age(age)
    alive = [(float(v) - age, float(p)) for v, p in zip(x, w, strict=True) if v > age]
    if not alive:
        return float(beyond_samples(x[-1], age))
    total = sum(p for _, p in alive)
    stops = [remaining for remaining, _ in alive]
    between = [(left + right) / 2 for left, right in pairwise(stops)]
    best = float("inf")
    for stop in [*stops, *between, 2 * stops[-1]]:
        spent = sum(min(remaining, stop) * p for remaining, p in alive) / total
        finished = sum(p for remaining, p in alive if remaining <= stop) / total
        if finished > 0.0:
            best = min(best, spent / finished)
    return best
