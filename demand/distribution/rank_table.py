"""Ranks for all ages at once, exact at every age, and for jobs of several applications."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, final

import numpy as np
from numpy.typing import ArrayLike

from demand.arguments import instance_of, instances_of
from demand.distribution.atoms import RESOLUTION_SECONDS, beyond_samples
from demand.distribution.distribution import Distribution
from demand.distribution.grid import default_step, round_down
from demand.distribution.hull import Tails
from demand.distribution.jumps import Jumps
from demand.distribution.rank_pieces import (
    Pieces,
    bucketed_pieces,
    gittins_pieces,
    hermes_artifact_pieces,
    mean_pieces,
)
from demand.distribution.rank_variants import RankOptions, check_variant
from demand.distribution.rank_with_costs import CostedRanks
from demand.errors import DemandError
from demand.seconds import Floats, as_seconds, check_age, one_number


class RanksByAge(Protocol):
    """Ranks at ages from 0 to below the largest atom; between jumps they only fall."""

    def __call__(self, ages: Floats) -> Floats:
        """Ranks at `ages`, any shape."""

    def at(self, age: float) -> float:
        """The same number for one age."""


class _Curve(NamedTuple):
    """What a table is made of: ranks below the largest atom, where they jump up, and the atom."""

    ranks: RanksByAge
    jump_ages: Floats
    jump_ranks: Floats
    largest: float


@final
class RankTable:
    """The rank of a job as a function of its age, exact at every age and fast to evaluate.

    It equals `distribution.gittins(age, variant=...)` at every age. Between jumps a rank only
    falls; it jumps up at atoms that the job survives.

    Args:
        distribution: total demand of the job in seconds.
        variant: `"gittins"`, the exact rank (`gittins_rank`); `"shifted"`, the exact rank of the
            samples rounded up to a grid (`shifted_rank`); `"mean"`, the mean remaining demand
            E[X - age | X > age], which is what SERPT serves by; and for comparison `"bucketed"`,
            which tries ten equally spaced times to give up, and `"hermes_artifact"`, what the
            public artifact of Hermes computes, rank 0 beyond the samples included. Do not
            schedule by the last.
        quantum: least seconds of service between two decisions; of `"gittins"` and `"shifted"`.
        preemption_cost: seconds lost by switching the job in; of the same two. Without both a
            table is fastest.

    Raises:
        DemandError: an unknown `variant`; a quantum or cost that is negative, not finite, or not 0
            for a variant that has none.
    """

    __slots__ = (
        "_at_zero",
        "_atoms",
        "_base",
        "_highest",
        "_inside",
        "_jumps",
        "_largest",
        "_options",
        "_ranks",
    )

    def __init__(
        self,
        distribution: Distribution,
        variant: str = "gittins",
        *,
        quantum: float = 0.0,
        preemption_cost: float = 0.0,
    ) -> None:
        instance_of("distribution", distribution, Distribution)
        self._options = check_variant(variant, quantum, preemption_cost)
        self._atoms = len(distribution)
        self._ranks, jump_ages, jump_ranks, self._largest = _BUILDERS[variant](
            distribution, self._options
        )
        self._inside = self._ranks.at
        self._base = max(self._largest, RESOLUTION_SECONDS)
        jump_ranks = np.append(jump_ranks, self._beyond_samples(np.asarray(self._largest)))
        self._jumps = Jumps(np.append(jump_ages, self._largest), jump_ranks)
        self._at_zero = self._inside(0.0) if self._largest else float(jump_ranks[-1])
        self._highest = max(self._at_zero, float(jump_ranks.max()))  # up to the largest atom

    def __call__(self, ages: ArrayLike) -> Floats:
        """Ranks in seconds of jobs of the given ages in seconds, any shape; smaller goes first.

        Raises:
            DemandError: an age that is negative or not finite.
        """
        age = as_seconds("ages", ages)
        if not age.size:
            return np.empty(age.shape)
        oldest = age.max()
        if not (age.min() >= 0.0 and oldest < math.inf):
            bad = ~((age >= 0.0) & np.isfinite(age))
            check_age(age[bad].flat[0])
        if oldest < self._largest:
            return self._ranks(age)
        beyond = age >= self._largest
        ranks = np.empty(age.shape)
        ranks[beyond] = self._beyond_samples(age[beyond])
        ranks[~beyond] = self._ranks(age[~beyond])
        return ranks

    def at(self, age: float) -> float:
        """Rank of one age: the same number as `self(age)`, without numpy's overhead.

        Raises:
            DemandError: an age that is negative, not finite or no single number of seconds.
        """
        try:
            if 0.0 < age < self._largest:
                return self._inside(age)
        except (TypeError, ValueError):  # no number, which costs nothing to tell like this
            return self.at(check_age(age))
        if age == 0.0:
            return self._at_zero
        return float(self._beyond_samples(np.asarray(check_age(age))))

    def next_above(self, age: float, threshold: float) -> float:
        """Least age, from `age` on, at which the rank exceeds `threshold`; infinity if none does.

        Between jumps ranks only fall, so the answer is `age` itself, a jump, or a doubling of
        the largest atom.

        Raises:
            DemandError: an age that is negative or not finite, or a threshold that is no number.
        """
        try:
            if threshold < self._highest or age >= self._largest:
                if self.at(age) > threshold:
                    return age
                found = self._jumps.first_above(age, threshold)
                if found < math.inf:
                    return found
        except (TypeError, ValueError):
            return self.next_above(check_age(age), one_number("threshold", threshold))
        if not threshold < math.inf:
            if threshold == math.inf:
                return math.inf
            raise DemandError("threshold is NaN; expected a rank, such as that of another job")
        if self._options.variant == "hermes_artifact":
            return math.inf
        cost = self._options.preemption_cost
        power = math.frexp((threshold - cost) / self._base)[1]
        rest = math.ldexp(self._base, max(power - 1, 0))
        while cost + rest <= threshold or rest <= age:
            rest *= 2.0
        return rest

    def __repr__(self) -> str:
        costs = "".join(
            f", {name} {seconds:.4g} s"
            for name, seconds in self._options._asdict().items()
            if name != "variant" and seconds
        )
        return (
            f"RankTable({self._options.variant}{costs}, {self._atoms} atoms, "
            f"rank at age 0 {self.at(0.0):.4g} s)"
        )

    def _beyond_samples(self, ages: Floats) -> Floats:
        if self._options.variant == "hermes_artifact":
            return np.zeros_like(ages)
        return self._options.preemption_cost + beyond_samples(self._largest, ages)


class _OnGrid:
    """Ranks of samples on a grid: an age is rounded down to the grid, as samples are rounded up."""

    def __init__(self, ranks: RanksByAge, step_seconds: float) -> None:
        self._ranks, self._step = ranks, step_seconds

    def __call__(self, ages: Floats) -> Floats:
        return self._ranks(round_down(ages, self._step))

    def at(self, age: float) -> float:
        return self._ranks.at(round_down(age, self._step))


def _gittins(distribution: Distribution, options: RankOptions) -> _Curve:
    tails = Tails.of(distribution.values, distribution.weights)
    if not options.quantum and not options.preemption_cost:
        return _of_pieces(gittins_pieces(tails), tails)
    ranks = CostedRanks(tails, options.quantum, options.preemption_cost)
    atoms = tails.ages[:-1]
    return _Curve(ranks, atoms, ranks(atoms), float(tails.ages[-1]))


def _shifted(distribution: Distribution, options: RankOptions) -> _Curve:
    step = default_step(distribution.values, distribution.weights)
    if step == 0.0:
        return _gittins(distribution, options)
    curve = _gittins(distribution.on_grid(step), options)
    return curve._replace(ranks=_OnGrid(curve.ranks, step))


def _simple(build: Callable[[Tails], Pieces]) -> Callable[[Distribution, RankOptions], _Curve]:
    def curve(distribution: Distribution, options: RankOptions) -> _Curve:
        tails = Tails.of(distribution.values, distribution.weights)
        return _of_pieces(build(tails), tails)

    return curve


def _of_pieces(pieces: Pieces, tails: Tails) -> _Curve:
    return _Curve(pieces, *pieces.jumps(), float(tails.ages[-1]))


_BUILDERS: dict[str, Callable[[Distribution, RankOptions], _Curve]] = {
    "gittins": _gittins,
    "shifted": _shifted,
    "bucketed": _simple(bucketed_pieces),
    "hermes_artifact": _simple(hermes_artifact_pieces),
    "mean": _simple(mean_pieces),
}


def rank_many(tables: Sequence[RankTable], applications: ArrayLike, ages: ArrayLike) -> Floats:
    """Ranks in seconds of `n` jobs, each by the table of its application.

    Args:
        tables: one for each application.
        applications: `[n]` whole numbers, which of `tables` each job goes by.
        ages: `[n]` attained service in seconds.

    Returns:
        `[n]` float64: `tables[applications[k]].at(ages[k])`.

    Raises:
        DemandError: shapes that differ, a number that names no table, or a bad age.
    """
    tables = instances_of("tables", tables, RankTable)
    which, age = np.asarray(applications), as_seconds("ages", ages)
    if which.ndim != 1 or which.shape != age.shape:
        raise DemandError(
            f"applications has shape {which.shape} and ages {age.shape}; expected one of each for "
            "every job, in two one-dimensional arrays of the same length"
        )
    if not which.size:
        return np.empty(0)
    if which.dtype.kind not in "iu" or which.min() < 0 or which.max() >= len(tables):
        raise DemandError(
            f"applications holds {which.dtype} from {which.min()} to {which.max()}; expected whole "
            f"numbers from 0 to {len(tables) - 1}, one for each of the {len(tables)} tables"
        )
    ranks = np.empty(which.size)
    for number, table in enumerate(tables):
        mine = np.flatnonzero(which == number)
        ranks[mine] = table(age[mine])
    return ranks
