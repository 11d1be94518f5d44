"""Weighted atoms: how samples become atoms, and what is assumed beyond the largest of them.

An atom is a number of seconds with a probability. Samples of a demand become atoms as they are
checked, sorted and merged; a `Distribution` holds nothing else.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from demand.errors import DemandError
from demand.seconds import Floats, as_numbers, as_seconds

RESOLUTION_SECONDS = 1e-9
"""Below this no demand is told from 0; the base of the doubling rule when every sample is 0."""

MOST_OUTCOMES = 1 << 24
"""Pairs of atoms that one convolution may form: some 400 MB while it runs."""


def clean_atoms(values: ArrayLike, weights: ArrayLike | None = None) -> tuple[Floats, Floats]:
    """Sort, merge and normalise weighted samples.

    Args:
        values: `[n]` seconds, finite and not negative, in any order.
        weights: `[n]` finite and not negative, not all 0; `None` weighs every sample alike.

    Returns:
        `(values, weights)`, both float64: distinct ascending values, positive weights of sum 1.

    Raises:
        DemandError: no samples, a NaN, an infinity, a negative number, what is no number of
            seconds (`demand.seconds.as_seconds`), shapes that differ, or weights that sum to 0.
    """
    x = check_samples("values", as_seconds("values", values))
    w = np.ones_like(x) if weights is None else check_weights(weights)
    if w.shape != x.shape:
        raise DemandError(
            f"weights has {w.size} entries for {x.size} values; give one weight for each value"
        )
    largest = w.max()
    if largest == 0.0:
        raise DemandError("the weights sum to 0; give at least one value a positive weight")
    w = w / largest  # so that neither huge nor tiny weights leave float64 when summed
    distinct, inverse = np.unique(x, return_inverse=True)
    merged = np.zeros_like(distinct)
    np.add.at(merged, inverse.reshape(-1), w)
    merged /= merged.sum()
    kept = merged > 0.0
    return distinct[kept], merged[kept]


def check_weights(weights: ArrayLike) -> Floats:
    """`weights` as float64 `[n]`, or `DemandError` as for `check_samples`."""
    return check_samples("weights", as_numbers("weights", weights))


def check_samples(name: str, numbers: Floats) -> Floats:
    """Return `numbers`, or raise `DemandError` unless `[n]`, n at least 1, finite, not negative."""
    if numbers.ndim != 1 or numbers.size == 0:
        raise DemandError(
            f"{name} has shape {numbers.shape}; expected a non-empty one-dimensional list: "
            "observe at least one run before asking for a distribution"
        )
    bad = ~(np.isfinite(numbers) & (numbers >= 0.0))
    if bad.any():
        at = int(np.argmax(bad))
        raise DemandError(
            f"{name}[{at}] is {numbers[at]}; expected finite numbers of at least 0: "
            "drop or repair the broken measurement"
        )
    return numbers


def beyond_samples(largest: float, ages: ArrayLike) -> Floats:
    """Remaining seconds assumed for jobs that have outlived every sample (the doubling rule).

    A job of age a >= m, the largest sample, is taken to need m * 2**j more seconds, where
    m * 2**j <= a < m * 2**(j + 1). This is the Lindy rule (remaining = age, a Pareto tail of
    index 1) rounded down to doublings of m. It is never 0, so that a job nobody has seen the like
    of is not served first (the public Hermes artifact gives such jobs rank 0). It is rounded
    because a rank that rises continuously would make two such jobs swap at every instant.

    Args:
        largest: m, seconds; anything below a nanosecond counts as a nanosecond.
        ages: seconds, any shape, each at least `largest`.

    Returns:
        float64 seconds of the same shape, positive.
    """
    base = max(float(largest), RESOLUTION_SECONDS)
    mantissa, power = np.frexp(np.maximum(ages, base))
    base_mantissa, base_power = math.frexp(base)
    return np.ldexp(base, power - base_power - (mantissa < base_mantissa))


def sum_atoms(first: tuple[Floats, Floats], second: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    """The sum of two independent demands: an atom for every pair of atoms, in no order.

    Args:
        first: `(values, weights)` of the one demand.
        second: those of the other.

    Returns:
        `(values, weights)` of the sum, not yet merged.

    Raises:
        DemandError: more than `MOST_OUTCOMES` pairs.
    """
    (x, p), (y, q) = first, second
    if x.size * y.size > MOST_OUTCOMES:
        raise DemandError(
            f"the sum of {x.size} and {y.size} atoms has {x.size * y.size} outcomes; expected at "
            f"most {MOST_OUTCOMES}: call compress on the larger one first"
        )
    return np.add.outer(x, y).ravel(), np.multiply.outer(p, q).ravel()


def compress_atoms(values: Floats, weights: Floats, atoms: int) -> tuple[Floats, Floats]:
    """At most `atoms` atoms of the same mean for ascending values, each a mean of neighbours.

    The range of the values is cut into h = atoms // 2 cells of equal width, and once more into h
    cells of equal mass; atoms that share both their cells become one. So no mass moves by more than
    (max - min) / h seconds, no atom made of several holds much more than 1 / h of the mass, and the
    mean is exact. The cells of equal mass keep the head of a long-tailed demand, those of equal
    width its tail. The largest value stays as it is, for beyond it the doubling rule takes over.

    Raises:
        DemandError: fewer than 2 atoms asked for.
    """
    if atoms < 2:
        raise DemandError(f"atoms is {atoms}; expected at least 2, such as 1000")
    half = atoms // 2
    span = float(values[-1] - values[0])
    by_width = np.zeros(values.size) if span == 0.0 else (values - values[0]) / span * half
    by_mass = (np.cumsum(weights) - weights) * half
    cells = np.minimum(np.floor([by_width, by_mass]), half - 1)
    cells[:, -1] = half  # the largest value on its own
    starts = np.append(0, np.flatnonzero(np.diff(cells).any(axis=0)) + 1)
    mass = np.add.reduceat(weights, starts)
    return np.add.reduceat(weights * values, starts) / mass, mass
