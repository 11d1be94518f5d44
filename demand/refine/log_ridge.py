"""Seconds predicted from features by least squares of their logarithm, with an empirical spread."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
from numpy.typing import ArrayLike

from demand.arguments import positive_number, set_whole_numbers
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.graph.run_columns import Ints
from demand.seconds import Floats, as_numbers, as_seconds, one_number


@dataclass(frozen=True)
class RidgeSettings:
    """Settings of `LogRidge`, which are those of all that predicts by it.

    Args:
        ridge: penalty on the squared standardised coefficients, in observations.
        atoms: number of equally likely atoms of each answer, quantiles of the factors.
        groups: observations are grouped by their prediction, into so many groups of one size.
        folds: of the runs, each predicted from the others; 1 predicts all from all.

    Raises:
        DemandError: a ridge that is not positive and finite, or atoms, groups or folds below 1.
    """

    ridge: float = 10.0
    atoms: int = 50
    groups: int = 10
    folds: int = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "ridge", positive_number("ridge", self.ridge))
        set_whole_numbers(self, "atoms", "groups", "folds", least=1)


@final
@dataclass(frozen=True)
class LogRidge(RidgeSettings):
    """Ridge regression of the logarithm of seconds, whose answers are distributions.

    Ours, not from a paper. The answer is the predicted seconds times the factors by which
    predictions of about that size were off, so that the spread is empirical and may change with the
    prediction. The factors come from predictions made without the observation in question
    (cross-validation in folds), or they would be too small.

    Arguments and errors are those of `RidgeSettings`.
    """

    def fit(
        self,
        features: ArrayLike,
        seconds: ArrayLike,
        *,
        run: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        least: float | None = None,
    ) -> "LogFit":
        """Solve the least squares once for all observations, and once without each fold.

        Args:
            features: `[n, d]`.
            seconds: `[n]` to predict.
            run: `[n]` number of the run of each observation, all of which are in one fold; `None`
                for observations that have nothing to do with each other.
            weights: `[n]` positive; `None` for all alike.
            least: fewer seconds count as so many, since there is no logarithm of 0; `None` for a
                thousandth of their mean.

        Raises:
            DemandError: no observations, other shapes, features that are not finite, or seconds
                that are negative or not finite.
        """
        x, y = np.asarray(features, dtype=np.float64), as_seconds("seconds", seconds)
        if x.ndim != 2 or y.shape != x.shape[:1] or not y.size:
            raise DemandError(
                f"features are {x.shape} and seconds {y.shape}; expected [n, d] and [n], of at "
                "least one observation"
            )
        if not (np.isfinite(x).all() and np.isfinite(y).all() and (y >= 0.0).all()):
            raise DemandError(
                "features or seconds are not finite, or seconds are negative; leave those "
                "observations out"
            )
        number = np.arange(y.size) if run is None else np.asarray(run, dtype=np.int64)
        weight = np.ones(y.size) if weights is None else as_numbers("weights", weights)
        floor = max(1e-3 * float(y.mean()) if least is None else one_number("least", least), 1e-9)
        return self._fit(x, np.log(np.maximum(y, floor)), number, weight)

    def _fit(self, x: Floats, y: Floats, run: Ints, weights: Floats) -> "LogFit":
        folds = [np.flatnonzero(run % self.folds == fold) for fold in range(self.folds)]
        folds = [own for own in folds if own.size]
        moments = [Moments.of(x[own], y[own], weights[own]) for own in folds]
        fitted = self._least_squares(Moments.merged(moments))
        predicted = fitted(x)
        left_out = predicted.copy()
        if len(folds) > 1:
            for at, own in enumerate(folds):
                rest = self._least_squares(Moments.merged([*moments[:at], *moments[at + 1 :]]))
                left_out[own] = rest(x[own])
        edges = np.quantile(left_out, np.arange(1, self.groups) / self.groups)
        group = np.searchsorted(edges, left_out, side="right")
        levels = (np.arange(self.atoms) + 0.5) / self.atoms
        residuals = []
        for g in range(self.groups):
            alike = group == g if (group == g).any() else group >= 0
            residuals.append(_quantiles((y - left_out)[alike], weights[alike], levels))
        span = (float(predicted.min()), float(predicted.max()))
        return LogFit(fitted, span, edges, np.array(residuals))

    def _least_squares(self, of: "Moments") -> "LogLinear":
        scale = np.sqrt(np.diag(of.scatter) / of.weight)
        scale[scale <= 1e-9] = np.inf  # a feature that never changes has no say
        each = of.observations / of.weight  # so that they weigh one on average
        gram = each * of.scatter / np.outer(scale, scale) + self.ridge * np.eye(scale.size)
        slopes = np.linalg.solve(gram, each * of.cross / scale) / scale
        return LogLinear(of.mean, slopes, of.level)


@dataclass(frozen=True, eq=False)
class LogLinear:
    """The logarithm of seconds as a linear function of the features.

    Attributes:
        mean: `[d]` of the features.
        slopes: `[d]` log seconds per unit of a feature.
        level: log seconds at the mean.
    """

    mean: Floats
    slopes: Floats
    level: float

    def __call__(self, features: Floats) -> Floats:
        """`[...]` log seconds at `[..., d]` features."""
        return self.level + (features - self.mean) @ self.slopes


@final
@dataclass(frozen=True, eq=False)
class LogFit:
    """A fitted regression, with the residuals that give its answers their spread.

    Attributes:
        fitted: predicts log seconds.
        span: least and greatest prediction at what was learned from; no answer goes beyond.
        edges: `[groups - 1]` log seconds between groups of predictions.
        residuals: `[groups, atoms]` log factors.
    """

    fitted: LogLinear
    span: tuple[float, float]
    edges: Floats
    residuals: Floats

    def __call__(self, features: Floats) -> Distribution:
        """Seconds at `[d]` features."""
        predicted = float(np.clip(self.fitted(features), *self.span))
        group = int(np.searchsorted(self.edges, predicted, side="right"))
        return Distribution(np.exp(predicted + self.residuals[group]))


class Moments(NamedTuple):
    """What least squares have to know of weighted observations.

    Attributes:
        observations: how many.
        weight: sum of their weights.
        mean: `[d]` of the features.
        level: mean of what is predicted.
        scatter: `[d, d]` weighted sum of the products of the features, less their means.
        cross: `[d]` the same of the features and what is predicted.
    """

    observations: int
    weight: float
    mean: Floats
    level: float
    scatter: Floats
    cross: Floats

    @classmethod
    def of(cls, x: Floats, y: Floats, weights: Floats) -> "Moments":
        """Those of `[n, d]` features and `[n]` predicted, with `[n]` weights."""
        weight = float(weights.sum())
        mean, level = weights @ x / weight, float(weights @ y) / weight
        centred = x - mean
        weighted = centred.T * weights
        return cls(y.size, weight, mean, level, weighted @ centred, weighted @ (y - level))

    @classmethod
    def merged(cls, parts: Sequence["Moments"]) -> "Moments":
        """Those of all observations together.

        Sums of squares are added up, never subtracted, so that no digit is lost to the means.
        """
        weights = np.array([part.weight for part in parts])
        means, levels = np.array([part.mean for part in parts]), [part.level for part in parts]
        mean, level = weights @ means / weights.sum(), float(weights @ levels) / weights.sum()
        off = means - mean
        weighted = off.T * weights
        return cls(
            sum(part.observations for part in parts),
            float(weights.sum()),
            mean,
            level,
            sum(part.scatter for part in parts) + weighted @ off,
            sum(part.cross for part in parts) + weighted @ (np.array(levels) - level),
        )


def _quantiles(values: Floats, weights: Floats, levels: Floats) -> Floats:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    at = np.searchsorted(cumulative, levels * cumulative[-1])
    return values[order][at]
