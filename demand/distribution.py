"""A distribution of demand as weighted atoms, conditioned on attained service."""

from typing import final

import numpy as np
from numpy.typing import ArrayLike

from demand.atoms import Floats, beyond_samples, check_age, clean_atoms
from demand.errors import DemandError
from demand.gittins import rank_of_sorted


@final
class Distribution:
    """Immutable distribution of seconds of demand, as weighted atoms (an empirical CDF).

    Every method takes an `age`, the seconds of service attained, and conditions on X > age: the
    job is still there. That holds at age 0 too, so an atom at 0 (a job with nothing to do) says
    nothing of a job that is present; `values @ weights` is the plain mean that counts it.

    Beyond the largest sample the atoms say nothing. From there on the remaining demand is taken
    to be a point mass by the doubling rule, `demand.atoms.beyond_samples`: at least half the age,
    at most the age, never 0. `survival` alone stays with the atoms and is 0 there.

    Args:
        values: `[n]` seconds, finite and not negative, in any order, repeats allowed.
        weights: `[n]` not negative, any positive sum; `None` weighs every sample alike.

    Attributes:
        values: `[n]` float64 seconds, ascending, distinct, read-only.
        weights: `[n]` float64, positive, of sum 1, read-only.

    Raises:
        DemandError: no samples, NaN, infinity, a negative number, or weights that sum to 0.
    """

    __slots__ = ("_mean", "_values", "_weights")

    def __init__(self, values: ArrayLike, weights: ArrayLike | None = None) -> None:
        self._values, self._weights = clean_atoms(values, weights)
        self._values.setflags(write=False)
        self._weights.setflags(write=False)
        self._mean = self._mean_from(0.0)

    @property
    def values(self) -> Floats:
        """Atoms in seconds, `[n]`, ascending and distinct."""
        return self._values

    @property
    def weights(self) -> Floats:
        """Probabilities of the atoms, `[n]`, of sum 1."""
        return self._weights

    def survival(self, age: float) -> float:
        """P(X > age) over the atoms."""
        return float(self._weights[self._first_above(check_age(age)) :].sum())

    def mean(self, age: float = 0.0) -> float:
        """E[X - age | X > age] in seconds."""
        return self._mean if age == 0.0 else self._mean_from(check_age(age))

    def quantile(self, q: float, age: float = 0.0) -> float:
        """Least r such that P(X - age <= r | X > age) >= q, in seconds.

        Raises:
            DemandError: q outside [0, 1], or a bad age.
        """
        if not 0.0 <= q <= 1.0:
            raise DemandError(f"q is {q}; a quantile needs 0 <= q <= 1, such as 0.95")
        age = check_age(age)
        first = self._first_above(age)
        if first == self._values.size:
            return float(beyond_samples(self._values[-1], age))
        cumulative = np.cumsum(self._weights[first:])
        # The slack keeps a quantile that falls on a step from being lost to rounding in the sum.
        at = int(np.searchsorted(cumulative, (q - 1e-12) * cumulative[-1]))
        return float(self._values[first + at] - age)

    def condition(self, age: float) -> "Distribution":
        """Distribution of the remaining seconds X - age of a job that has X > age."""
        age = check_age(age)
        first = self._first_above(age)
        if first == self._values.size:
            return Distribution([float(beyond_samples(self._values[-1], age))])
        return Distribution(self._values[first:] - age, self._weights[first:])

    def gittins(self, age: float = 0.0) -> float:
        """Exact Gittins rank in seconds, smaller first; `gittins_rank` has the equation."""
        return rank_of_sorted(self._values, self._weights, check_age(age))

    def __len__(self) -> int:
        return self._values.size

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Distribution):
            return NotImplemented
        return np.array_equal(self._values, other._values) and np.array_equal(
            self._weights, other._weights
        )

    def __hash__(self) -> int:
        return hash((self._values.tobytes(), self._weights.tobytes()))

    def __repr__(self) -> str:
        return (
            f"Distribution({len(self)} atoms, mean {self.mean():.4g} s, "
            f"median {self.quantile(0.5):.4g} s, p95 {self.quantile(0.95):.4g} s, "
            f"max {self._values[-1]:.4g} s)"
        )

    def _first_above(self, age: float) -> int:
        return int(np.searchsorted(self._values, age, side="right"))

    def _mean_from(self, age: float) -> float:
        first = self._first_above(age)
        if first == self._values.size:
            return float(beyond_samples(self._values[-1], age))
        weight = self._weights[first:]
        return float(weight @ (self._values[first:] - age) / weight.sum())
