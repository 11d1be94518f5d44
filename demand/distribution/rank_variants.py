"""The ranks by name, one age at a time: the exact one, and those it is compared with."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from demand.distribution.atoms import beyond_samples, clean_atoms
from demand.distribution.grid import default_step, round_down, round_up
from demand.distribution.rank import rank_of_sorted
from demand.errors import DemandError
from demand.seconds import Floats, check_seconds

BUCKETS = 10
"""Equal-width stops of the bucketed ranks: the default of the Hermes artifact."""


class RankOptions(NamedTuple):
    """Which variant of the rank is meant, with its quantum and preemption cost in seconds."""

    variant: str
    quantum: float
    preemption_cost: float


def check_variant(variant: str, quantum: float, preemption_cost: float) -> RankOptions:
    """Check the name of a variant and what goes with it.

    Raises:
        DemandError: an unknown name, a quantum or cost that is negative or not finite, or one
            that is not 0 for a variant that has none.
    """
    if not isinstance(variant, str) or variant not in RANKS:
        raise DemandError(f"variant is {variant!r}; expected one of {', '.join(RANKS)}")
    options = RankOptions(
        variant,
        check_seconds("quantum", quantum),
        check_seconds("preemption_cost", preemption_cost),
    )
    if variant not in COSTED_RANKS and (options.quantum or options.preemption_cost):
        raise DemandError(
            f"variant {variant!r} knows no quantum ({options.quantum}) and no preemption_cost "
            f"({options.preemption_cost}); leave both at 0, or use {' or '.join(COSTED_RANKS)}"
        )
    return options


def rank_at(values: Floats, weights: Floats, age: float, options: RankOptions) -> float:
    """The rank that `options` name, of a job of one age; atoms and age must be checked already."""
    costs = options[1:] if options.variant in COSTED_RANKS else ()
    return RANKS[options.variant](values, weights, age, *costs)


def shifted_rank(
    values: Floats, weights: Floats, age: float, quantum: float = 0.0, preemption_cost: float = 0.0
) -> float:
    """Gittins rank of the samples rounded up, at the age rounded down, to the default grid.

    After "shifted empirical Gittins" (arXiv 2606.24703), of which the default step and rounding the
    age down are ours (`demand.distribution.grid`). Within a cell of the grid the rank stands still.
    """
    step = default_step(values, weights)
    atoms, masses = clean_atoms(round_up(values, step), weights)
    at = round_down(age, step) if age < atoms[-1] else age
    return rank_of_sorted(atoms, masses, at, quantum, preemption_cost)


def bucketed_rank(values: Floats, weights: Floats, age: float) -> float:
    """Least E[min(X - a, D)] / P(X - a <= D), given X > a, over ten equal-width D.

    D = j (m - a) / 10 for j = 1 ... 10 and m the largest sample. At least the exact rank; much
    more where a likely stop falls between two D, as on a narrow mode far below m.
    """
    best = math.inf
    for stop, gain, weight, inside in _buckets(values, weights, age):
        finished = weight[inside].sum()
        if finished > 0.0:
            best = min(best, float(weight @ np.minimum(gain, stop) / finished))
    return best if best < math.inf else float(beyond_samples(values[-1], age))


def hermes_artifact_rank(values: Floats, weights: Floats, age: float) -> float:
    """What the public Hermes artifact ranks by. For ablation only: not to be used.

    Least E[X - a | X - a <= D] / P(X - a <= D), given X > a, over the ten D of `bucketed_rank`.
    The numerator leaves out the time spent on jobs that do not finish, and a job that has
    outlived every sample has rank 0: it goes before everything, which is why no other rank here
    does so.
    """
    best = math.inf
    for _, gain, weight, inside in _buckets(values, weights, age):
        finished = weight[inside].sum()
        if finished > 0.0:
            mean = weight[inside] @ gain[inside] / finished
            best = min(best, float(mean * weight.sum() / finished))
    return best if best < math.inf else 0.0


def mean_remaining(values: Floats, weights: Floats, age: float) -> float:
    """E[X - a | X > a], what SERPT serves by."""
    first = int(np.searchsorted(values, age, side="right"))
    if first == values.size:
        return float(beyond_samples(values[-1], age))
    weight = weights[first:]
    return float(weight @ (values[first:] - age) / weight.sum())


def bucket_entries(values: Floats, bucket: int) -> Floats:
    """Age from which on each atom lies within stop number `bucket`, of 1 to 10.

    a + j (m - a) / 10 >= x where a >= (10 x - j m) / (10 - j). Both the ranks above and the table
    compare ages with these numbers, so that they agree on an age that is one of them.
    """
    if bucket == BUCKETS:
        return np.full_like(values, -math.inf)
    return (BUCKETS * values - bucket * values[-1]) / (BUCKETS - bucket)


def _buckets(
    values: Floats, weights: Floats, age: float
) -> Iterator[tuple[float, Floats, Floats, NDArray[np.bool_]]]:
    """Each stop in seconds; seconds left and weights of the atoms above `age`; those it reaches."""
    alive = values > age
    gain, weight = values[alive] - age, weights[alive]
    if gain.size:
        for bucket in range(1, BUCKETS + 1):
            inside = bucket_entries(values, bucket)[alive] <= age
            yield bucket * float(gain[-1]) / BUCKETS, gain, weight, inside


COSTED_RANKS = ("gittins", "shifted")
"""Variants that may be given a quantum and a preemption cost."""

RANKS: dict[str, Callable[..., float]] = {
    "gittins": rank_of_sorted,
    "shifted": shifted_rank,
    "bucketed": bucketed_rank,
    "hermes_artifact": hermes_artifact_rank,
    "mean": mean_remaining,
}
