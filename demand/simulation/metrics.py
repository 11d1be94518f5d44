"""Confidence intervals over replications (bootstrap), and Jain's index of fairness."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from demand.arguments import whole_number
from demand.errors import DemandError
from demand.seconds import Floats, as_numbers, as_seconds, one_number


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float


def bootstrap_interval(
    replications: ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean of independent replications.

    Args:
        replications: `[r]`, one number for each independent seed, such as `result.mean` or
            `result.quantile(0.95)`. Not the completion times of one run: jobs that queue behind
            each other are correlated, and the interval would be far too narrow.
        confidence: between 0 and 1.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        DemandError: fewer than two replications, one that is not finite, a confidence outside
            (0, 1), or resamples or a seed that are no whole numbers.
    """
    values = _replications(replications)
    return _percentile(
        lambda drawn: values[drawn].mean(axis=1), values.size, confidence, resamples, seed
    )


def paired_ratio_interval(
    ours: ArrayLike,
    baseline: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of mean(ours) / mean(baseline), replications drawn in pairs.

    Entry i of both must come from the same workload; what the two share then cancels.

    Raises:
        DemandError: as `bootstrap_interval`, and for lengths that differ or a baseline that is not
            positive.
    """
    first, second = _replications(ours), _replications(baseline)
    if first.size != second.size:
        raise DemandError(
            f"there are {first.size} and {second.size} replications; pair them seed by seed"
        )
    if not (second > 0.0).all():
        raise DemandError(
            f"baseline has the replication {second.min()}; expected positive numbers, the ratio to "
            "0 being undefined: take bootstrap_interval of the differences ours - baseline"
        )
    return _percentile(
        lambda drawn: first[drawn].mean(axis=1) / second[drawn].mean(axis=1),
        first.size,
        confidence,
        resamples,
        seed,
    )


def jain_index(shares: ArrayLike) -> float:
    """Jain's index of `[n]` shares, (sum x)^2 / (n sum x^2): 1 for all alike, 1/n for all to one.

    Raises:
        DemandError: no shares, or one that is negative or not finite.
    """
    x = as_numbers("shares", shares)
    if x.ndim != 1 or not x.size or not (np.isfinite(x) & (x >= 0.0)).all():
        raise DemandError(f"shares have shape {x.shape}; expected [n] finite numbers of at least 0")
    square = float(np.square(x).sum()) * x.size
    return float(x.sum()) ** 2 / square if square else 1.0


def _replications(numbers: ArrayLike) -> Floats:
    values = as_seconds("replications", numbers)
    if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
        raise DemandError(
            f"replications have shape {values.shape}; expected at least two finite numbers, "
            "one for each seed"
        )
    return values


def _percentile(
    statistic: Callable[[np.ndarray], Floats],
    size: int,
    confidence: float,
    resamples: int,
    seed: int,
) -> Interval:
    confidence = one_number("confidence", confidence)
    if not 0.0 < confidence < 1.0:
        raise DemandError(f"confidence is {confidence}; expected a number between 0 and 1")
    resamples = whole_number("resamples", resamples, least=1)
    generator = np.random.default_rng(whole_number("seed", seed, least=0))
    drawn = generator.integers(size, size=(resamples, size))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(statistic(drawn), [tail, 1.0 - tail])
    return Interval(float(statistic(np.arange(size)[None])[0]), float(low), float(high))
