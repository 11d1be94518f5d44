"""A distribution of demand as weighted atoms, conditioned on attained service."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import numpy as np
from numpy.typing import ArrayLike

from demand.arguments import instance_of, instances_of, whole_number
from demand.distribution.atoms import (
    RESOLUTION_SECONDS,
    beyond_samples,
    check_weights,
    clean_atoms,
    compress_atoms,
    sum_atoms,
)
from demand.distribution.drawing import INCHES, draw_distribution
from demand.distribution.grid import check_step, default_step, round_up
from demand.distribution.rank_variants import check_variant, mean_remaining, rank_at
from demand.errors import DemandError
from demand.plotting import fixed_axes, svg
from demand.seconds import Floats, check_age, one_number, one_of_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SLACK = 1e-12
"""Relative error that sums of many weights may have."""

EPSILON = 2.0**-52
"""Relative distance of two neighbouring floats: how well 1 - q is known for a q just below 1."""

DRAWN_AGES = 120
"""Ages at which a picture has the rank."""


@final
class Distribution:
    """Immutable distribution of seconds of demand, as weighted atoms (an empirical CDF).

    Every method takes an `age`, the seconds of service attained, and conditions on X > age: the
    job is still there. That holds at age 0 too, so an atom at 0 (a job with nothing to do) says
    nothing of a job that is present; `values @ weights` is the plain mean that counts it.

    Beyond the largest sample the atoms say nothing. From there on the remaining demand is taken
    to be a point mass by the doubling rule, `beyond_samples`: at least half the age,
    at most the age, never 0. `survival` alone stays with the atoms and is 0 there.

    Args:
        values: `[n]` seconds, finite and not negative, in any order, repeats allowed.
        weights: `[n]` not negative, any positive sum; `None` weighs every sample alike.

    Attributes:
        values: `[n]` float64 seconds, ascending, distinct, read-only.
        weights: `[n]` float64, positive, of sum 1, read-only.
        extrapolated: whether no sample stands behind it. `condition(age)` beyond the largest sample
            has nothing to go by; it gives one atom, the remaining seconds that the doubling rule
            assumes at that age, and marks it so. A scheduler should not learn from it (`Job.learn`
            does not), and for other ages ask the distribution that it was made from.

    Raises:
        DemandError: no samples, NaN, infinity, a negative number, or weights that sum to 0.
    """

    __slots__ = ("_extrapolated", "_mean", "_values", "_weights")

    def __init__(self, values: ArrayLike, weights: ArrayLike | None = None) -> None:
        self._values, self._weights = clean_atoms(values, weights)
        self._values.setflags(write=False)
        self._weights.setflags(write=False)
        self._mean = mean_remaining(self._values, self._weights, 0.0)
        self._extrapolated = False

    @property
    def values(self) -> Floats:
        """Atoms in seconds, `[n]`, ascending and distinct."""
        return self._values

    @property
    def weights(self) -> Floats:
        """Probabilities of the atoms, `[n]`, of sum 1."""
        return self._weights

    @property
    def extrapolated(self) -> bool:
        """Whether `condition` made it for an age beyond the largest sample: a rule, not samples."""
        return self._extrapolated

    def survival(self, age: float) -> float:
        """P(X > age), the share of the samples that are longer; 0 beyond the largest."""
        return float(self._weights[self._first_above(check_age(age)) :].sum())

    def mean(self, age: float = 0.0) -> float:
        """E[X - age | X > age] in seconds."""
        if age == 0.0:
            return self._mean
        return mean_remaining(self._values, self._weights, check_age(age))

    def quantile(self, q: float, age: float = 0.0) -> float:
        """Least r such that P(X - age <= r | X > age) >= q, in seconds.

        Raises:
            DemandError: q outside [0, 1], or a bad age.
        """
        q = one_number("q", q)
        if not 0.0 <= q <= 1.0:
            raise DemandError(f"q is {q}; a quantile needs 0 <= q <= 1, such as 0.95")
        age = check_age(age)
        first = self._first_above(age)
        if first == self._values.size:
            return float(beyond_samples(self._values[-1], age))
        weights = self._weights[first:]
        # Sums from the nearer end, since a sum from the far one would lose a thin tail to rounding;
        # the slack keeps a quantile that falls on a step from being lost to it.
        if q < 0.5:
            below = np.cumsum(weights)
            at = np.searchsorted(below, (1.0 - SLACK) * q * below[-1])
        else:
            beyond = np.cumsum(weights[::-1])  # mass of the last one, two, ... atoms
            above = (1.0 - q) * (1.0 + SLACK) + (EPSILON if q < 1.0 else 0.0)
            at = weights.size - 1 - np.searchsorted(beyond, above * beyond[-1], side="right")
        return float(self._values[first + max(int(at), 0)] - age)

    def condition(self, age: float) -> "Distribution":
        """Distribution of the remaining seconds X - age of a job that has X > age.

        Up to the largest sample its answers at age b are those of this one at `age` + b. Beyond the
        largest sample it is a single atom, what the doubling rule assumes at `age`, and
        `extrapolated`.
        """
        age = check_age(age)
        first = self._first_above(age)
        if first == self._values.size:
            rest = Distribution([float(beyond_samples(self._values[-1], age))])
            rest._extrapolated = True
            return rest
        return Distribution(self._values[first:] - age, self._weights[first:])

    def gittins(
        self,
        age: float = 0.0,
        *,
        variant: str = "gittins",
        quantum: float = 0.0,
        preemption_cost: float = 0.0,
    ) -> float:
        """Gittins rank in seconds, smaller first; exact by default.

        Args:
            age: attained service in seconds.
            variant: `"gittins"`, the exact rank (`gittins_rank` has the equation), or one of
                `"shifted"`, `"bucketed"`, `"hermes_artifact"` and `"mean"` (`RankTable` says what
                each is).
            quantum: least seconds of service between two decisions.
            preemption_cost: seconds lost by switching the job in.

        Raises:
            DemandError: as `RankTable`, which gives the same number, and for a bad age.
        """
        options = check_variant(variant, quantum, preemption_cost)
        return rank_at(self._values, self._weights, check_age(age), options)

    @classmethod
    def mixture(
        cls, distributions: Sequence["Distribution"], weights: ArrayLike | None = None
    ) -> "Distribution":
        """The demand of a job that follows one of `distributions`, with odds `weights`.

        Exact: the atoms of all, `None` weighing every distribution alike.

        Raises:
            DemandError: no distributions, or weights that do not fit them or sum to 0.
        """
        distributions = instances_of("distributions", distributions, Distribution)
        if not distributions:
            raise DemandError("a mixture of no distributions; expected at least one")
        n = len(distributions)
        odds = np.ones(n) if weights is None else check_weights(weights)
        if odds.size != n:
            raise DemandError(
                f"weights has {odds.size} entries for {n} distributions; give one for each"
            )
        masses = [share * d.weights for share, d in zip(odds, distributions, strict=True)]
        return cls(np.concatenate([d.values for d in distributions]), np.concatenate(masses))

    def convolve(self, other: "Distribution", atoms: int = 1000) -> "Distribution":
        """The sum of two independent demands, one after the other; `a + b` for short.

        Atoms multiply, so the result is compressed as by `compress(atoms)`.

        Raises:
            DemandError: fewer than 2 atoms, or more than 2**24 pairs of atoms.
        """
        instance_of("other", other, Distribution)
        pairs = sum_atoms((self._values, self._weights), (other.values, other.weights))
        return Distribution(*pairs).compress(atoms)

    def compress(self, atoms: int) -> "Distribution":
        """At most `atoms` atoms of the same mean, the largest kept, by merging neighbours.

        No probability moves by more than (max - min) / (atoms // 2) seconds; `compress_atoms` has
        the rule. With that many or fewer atoms already, nothing changes.

        Raises:
            DemandError: fewer than 2 atoms.
        """
        atoms = whole_number("atoms", atoms)
        if 2 <= atoms >= len(self):
            return self
        return Distribution(*compress_atoms(self._values, self._weights, atoms))

    def scale(self, factor: float) -> "Distribution":
        """The demand times `factor`, as on a machine that takes that many times as long.

        Raises:
            DemandError: a factor that is not positive and finite.
        """
        factor = one_number("factor", factor)
        if not 0.0 < factor < math.inf:
            raise DemandError(f"factor is {factor}; expected a positive finite number, such as 2.0")
        return Distribution(self._values * factor, self._weights)

    def shift(self, seconds: float) -> "Distribution":
        """The demand plus `seconds`, which may be negative down to minus the smallest atom.

        Raises:
            DemandError: seconds that are not finite, or would make an atom negative.
        """
        seconds = one_of_seconds("seconds", seconds)
        if not -self._values[0] <= seconds < math.inf:
            raise DemandError(
                f"seconds is {seconds}; expected finite seconds of at least minus the smallest "
                f"atom, {self._values[0]}: for a job that has been served already use condition"
            )
        return Distribution(self._values + seconds, self._weights)

    def on_grid(self, step_seconds: float | None = None) -> "Distribution":
        """Every atom rounded up to a multiple of `step_seconds`, against noise in the rank.

        Between two samples the Gittins rank of raw samples falls as if jobs ended at the next
        sample's age; `demand.distribution.grid` has the reason and the source. The default step
        is half the interquartile range over the cube root of the effective number of samples.

        Raises:
            DemandError: a step that is not positive and finite, or too small to be told apart.
        """
        if step_seconds is None:
            step = default_step(self._values, self._weights)
            if step == 0.0:
                return self
        else:
            step = check_step(step_seconds, float(self._values[-1]))
        return Distribution(round_up(self._values, step), self._weights)

    def __add__(self, other: object) -> "Distribution":
        return self.convolve(other) if isinstance(other, Distribution) else NotImplemented

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

    def figure(self, ax: "Axes | None" = None) -> "Axes":
        """The share of the jobs by their seconds, up to the 99th percentile, and the rank by age.

        The rank is that of the samples on a grid (`variant="shifted"`): the exact one falls between
        any two samples. Of more than 1,000 atoms it is that of `compress(1000)`.

        Args:
            ax: axes to draw into; those of a new figure by default, which is ``axes.figure``.

        Raises:
            DemandError: matplotlib is not installed.
        """
        until = max(self.quantile(0.99), RESOLUTION_SECONDS)
        ages = np.linspace(0.0, until, DRAWN_AGES)
        drawn = self.compress(1000)
        ranks = np.array([drawn.gittins(age, variant="shifted") for age in ages])
        ax = draw_distribution(self._values, self._weights, ages, ranks, ax)
        ax.set_title(self._figures, fontsize=9)
        return ax

    def _repr_svg_(self) -> str | None:
        return svg(lambda: self.figure(fixed_axes(INCHES)))

    @property
    def _figures(self) -> str:
        return (
            f"{len(self)} atoms, mean {self.mean():.4g} s, "
            f"median {self.quantile(0.5):.4g} s, p95 {self.quantile(0.95):.4g} s, "
            f"max {self._values[-1]:.4g} s"
        )

    def __repr__(self) -> str:
        return f"Distribution({self._figures})"

    def _first_above(self, age: float) -> int:
        return int(np.searchsorted(self._values, age, side="right"))
