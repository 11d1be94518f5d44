"""Weighted atoms: validation, and the stated rule beyond the largest sample."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from demand.errors import DemandError

Floats = NDArray[np.float64]

RESOLUTION_SECONDS = 1e-9
"""Below this no demand is told from 0; the base of the doubling rule when every sample is 0."""


def clean_atoms(values: ArrayLike, weights: ArrayLike | None = None) -> tuple[Floats, Floats]:
    """Sort, merge and normalise weighted samples.

    Args:
        values: `[n]` seconds, finite and not negative, in any order.
        weights: `[n]` finite and not negative, not all 0; `None` weighs every sample alike.

    Returns:
        `(values, weights)`, both float64: distinct ascending values, positive weights of sum 1.

    Raises:
        DemandError: no samples, a NaN, an infinity, a negative number, shapes that differ, or
            weights that sum to 0.
    """
    x = check_numbers("values", values)
    w = np.ones_like(x) if weights is None else check_numbers("weights", weights)
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


def check_age(age: float) -> float:
    """Return `age` in seconds as a float, or raise `DemandError` if negative or not finite."""
    age = float(age)
    if not 0.0 <= age < np.inf:
        raise DemandError(
            f"age is {age}; it is attained service in seconds, finite and at least 0: "
            "pass the time the job has been served, not a clock difference that can go backwards"
        )
    return age


def check_seconds(name: str, seconds: float) -> float:
    """Return `seconds` as a float, or raise `DemandError` if negative or not finite."""
    seconds = float(seconds)
    if not 0.0 <= seconds < np.inf:
        raise DemandError(f"{name} is {seconds}; expected finite seconds of at least 0: 0 for none")
    return seconds


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
    ratio = np.maximum(np.asarray(ages, dtype=np.float64) / base, 1.0)
    return np.ldexp(base, np.frexp(ratio)[1] - 1)


def check_numbers(name: str, numbers: ArrayLike) -> Floats:
    """Return a float64 copy `[n]`, or raise `DemandError` if empty, negative or not finite."""
    try:
        vector = np.array(numbers, dtype=np.float64)
    except (TypeError, ValueError) as error:
        message = f"{name} is not a list of numbers ({error}); pass one number for each sample"
        raise DemandError(message) from error
    if vector.ndim != 1 or vector.size == 0:
        raise DemandError(
            f"{name} has shape {vector.shape}; expected a non-empty one-dimensional list: "
            "observe at least one run before asking for a distribution"
        )
    bad = ~(np.isfinite(vector) & (vector >= 0.0))
    if bad.any():
        at = int(np.argmax(bad))
        raise DemandError(
            f"{name}[{at}] is {vector[at]}; expected finite numbers of at least 0: "
            "drop or repair the broken measurement"
        )
    return vector
