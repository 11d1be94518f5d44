"""Samples rounded up to a grid, so that chance gaps between them do not pass for chances to stop.

Between two atoms an empirical Gittins rank falls towards 0, as if the next sample's age were a
time at which jobs end. For samples of an exponential, whose rank is the same at all ages, it is off
by a factor of 2.7 however many there are, and by 1.07 at 2,000 on the default grid
(`docs/results/rank_noise.json`): rounded up, the samples of one cell are one atom, and the rank
converges ("shifted empirical Gittins", Gast, Gaujal and Obrecht, arXiv 2606.24703). The raw rank is
already near-optimal as a policy ("Empirical Gittins", Ramakrishna et al. 2026, doi
10.1145/3788091), so the grid is for those who need the rank itself.
"""

import math
from typing import overload

import numpy as np

from demand.errors import DemandError
from demand.seconds import Floats, one_of_seconds

MOST_STEPS = 2.0**40
"""Steps from 0 to the largest atom: far from where float64 cannot tell two of them apart."""


def default_step(values: Floats, weights: Floats) -> float:
    """Grid in seconds for ascending samples: half the interquartile range over the cube root of n.

    n is the effective number of samples, 1 / sum of squared weights (Kish); the rate is that of
    histogram cells, and the width a quarter of the rule of Freedman and Diaconis (1981): less
    bias, since here all error by width goes one way. It is 0, no grid, where both quartiles are
    the same atom, or differ by rounding only. For a demand known exactly, rather than sampled, no
    grid is wanted.
    """
    cumulative = np.cumsum(weights)
    low, high = values[np.searchsorted(cumulative, [0.25 - 1e-12, 0.75 - 1e-12])]
    effective = 1.0 / float(weights @ weights)
    step = float(high - low) / 2.0 / effective ** (1.0 / 3.0)
    return step if step * MOST_STEPS > values[-1] else 0.0


def check_step(step_seconds: float, largest: float) -> float:
    """Return `step_seconds` as a float, or raise `DemandError` if no grid up to `largest`."""
    step_seconds = one_of_seconds("step_seconds", step_seconds)
    if not (0.0 < step_seconds < math.inf and step_seconds * MOST_STEPS > largest):
        raise DemandError(
            f"step_seconds is {step_seconds} for atoms up to {largest}; expected positive finite "
            f"seconds, over {largest / MOST_STEPS:.3g}, or None for half the interquartile range "
            "over the cube root of the number of samples"
        )
    return step_seconds


def round_up(values: Floats, step_seconds: float) -> Floats:
    """Least k * step_seconds, k whole, at or above each value; the values themselves for step 0."""
    if step_seconds == 0.0:
        return values
    k = np.ceil(values / step_seconds)
    # The quotient may be off by a rounding; the products are what counts.
    k = np.where((k - 1.0) * step_seconds >= values, k - 1.0, k)
    return np.where(k * step_seconds < values, k + 1.0, k) * step_seconds


@overload
def round_down(age: float, step_seconds: float) -> float: ...
@overload
def round_down(age: Floats, step_seconds: float) -> Floats: ...
def round_down(age: float | Floats, step_seconds: float) -> float | Floats:
    """Greatest k * step_seconds, k whole, at or below each age; the ages themselves for step 0."""
    if step_seconds == 0.0:
        return age
    if isinstance(age, np.ndarray):
        k = np.floor(age / step_seconds)
        k = np.where((k + 1.0) * step_seconds <= age, k + 1.0, k)
        return np.where(k * step_seconds > age, k - 1.0, k) * step_seconds
    whole = math.floor(age / step_seconds)
    if (whole + 1) * step_seconds <= age:
        whole += 1
    elif whole * step_seconds > age:
        whole -= 1
    return whole * step_seconds
