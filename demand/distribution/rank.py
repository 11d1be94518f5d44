"""The Gittins rank of one age: the exact vectorised form and its slow, obvious twin."""

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from demand.distribution.atoms import beyond_samples, clean_atoms
from demand.seconds import Floats, check_age, check_seconds


def gittins_rank(
    values: ArrayLike,
    weights: ArrayLike | None,
    age: float,
    quantum: float = 0.0,
    preemption_cost: float = 0.0,
) -> float:
    """Exact Gittins rank of a job of the given age; the job with the smaller rank goes first.

    G(a) = inf over D > 0 of E[min(X - a, D) | X > a] / P(X - a <= D | X > a): the least expected
    service per completion over all ways of giving up after D (arXiv 2506.14851, equation of the
    priority; the index of the Gittins literature is 1 / G). For atoms the infimum is attained
    with D at an atom, so one cumulative sum tries them all: O(n log n) with the sort.

    A job that keeps its place for at least a quantum cannot give up earlier, so D >= quantum; a
    job that costs something to switch in pays it whatever happens, so the cost is added to the
    numerator. A scheduler that charges for preemption gives the cost to the jobs that wait, and 0
    to the one it serves.

    The public Hermes artifact differs: `hermes_artifact_rank`.

    Args:
        values: `[n]` seconds of total demand.
        weights: `[n]`, or `None` for equal weights.
        age: attained service in seconds.
        quantum: least seconds of service between two decisions.
        preemption_cost: seconds lost by switching the job in.

    Returns:
        Seconds, positive. From the largest sample on: `beyond_samples`, and the cost.

    Raises:
        DemandError: as `Distribution`, and for an age, quantum or cost that is negative or not
            finite.
    """
    return rank_of_sorted(
        *clean_atoms(values, weights),
        check_age(age),
        check_seconds("quantum", quantum),
        check_seconds("preemption_cost", preemption_cost),
    )


def rank_of_sorted(
    values: Floats, weights: Floats, age: float, quantum: float = 0.0, preemption_cost: float = 0.0
) -> float:
    """`gittins_rank` for ascending distinct values with positive weights, unchecked."""
    first = int(np.searchsorted(values, age, side="right"))
    if first == values.size:
        return preemption_cost + float(beyond_samples(values[-1], age))
    weight = weights[first:]
    alive = np.cumsum(weight[::-1])[::-1]  # who gets as far as each atom
    steps = values[first:] - age
    gain = steps.copy() if quantum else None
    steps[1:] = np.diff(values[first:])
    finished = np.cumsum(weight)
    # Sums of positive terms alone: a difference of sums would be lost in demands of many decades.
    spent = np.cumsum(alive * steps) + preemption_cost * alive[0]
    if gain is not None:
        # Stops below the quantum become the quantum. Of those the last has the true numerator and
        # denominator; the others count too few completions, so they do not lower the minimum.
        spent[:-1] += np.maximum(quantum - gain[:-1], 0.0) * alive[1:]
    return float(np.min(spent / finished))


def gittins_brute_force(
    values: ArrayLike,
    weights: ArrayLike | None,
    age: float,
    quantum: float = 0.0,
    preemption_cost: float = 0.0,
) -> float:
    """Slow twin of `gittins_rank`, straight from the definition: every D at and between atoms."""
    x, w = clean_atoms(values, weights)
    age = check_age(age)
    alive = [(float(v) - age, float(p)) for v, p in zip(x, w, strict=True) if v > age]
    if not alive:
        return preemption_cost + float(beyond_samples(x[-1], age))
    total = sum(p for _, p in alive)
    stops = [remaining for remaining, _ in alive]
    between = [(left + right) / 2 for left, right in pairwise(stops)]
    best = float("inf")
    for stop in [quantum, *stops, *between, 2 * stops[-1]]:
        spent = sum(min(remaining, stop) * p for remaining, p in alive) / total
        finished = sum(p for remaining, p in alive if remaining <= stop) / total
        if stop >= quantum and finished > 0.0:
            best = min(best, (preemption_cost + spent) / finished)
    return best
