"""A prediction by regression on what a run has shown at the boundaries between its units."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
from typing_extensions import override

from demand.arguments import instance_of, renamed_keyword, set_whole_numbers
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.graph.pdgraph import PDGraph
from demand.refine.base import Refined, Refinement
from demand.refine.features import ProgressFeatures
from demand.seconds import Floats
from demand.units import ParallelCalls, Progress


@final
@dataclass(frozen=True)
class ProgressRegression(Refinement):
    """Predicts by a ridge regression of the logarithm of the remaining seconds on progress.

    Ours, not from a paper. Every boundary between two units of every remembered run is one
    observation; `ProgressFeatures` lists what is known there. The answer is a distribution: the
    predicted seconds times the factors by which predictions of about that size were off, so that
    the spread is empirical and may change with the prediction. The factors come from predictions
    made without the run in question (cross-validation in folds), or they would be too small. While
    a unit runs, the answer at its start is conditioned on the seconds it has received.

    Args:
        ridge: penalty on the squared standardised coefficients, in observations.
        atoms: number of equally likely atoms of each answer, quantiles of the factors.
        groups: observations are grouped by their prediction, into so many groups of one size.
        folds: of the runs, each predicted from the others; 1 predicts all from all.

    Raises:
        DemandError: a ridge that is not positive, or atoms, groups or folds below 1.
    """

    ridge: float = 10.0
    atoms: int = 50
    groups: int = 10
    folds: int = 5

    def __post_init__(self) -> None:
        if not 0.0 < self.ridge < np.inf:
            raise DemandError(
                f"ridge is {self.ridge}; expected a positive finite number: features that are "
                "alike in all runs have no solution without one"
            )
        set_whole_numbers(self, "atoms", "groups", "folds", least=1)

    @override
    @renamed_keyword("demand", "parallel_calls")
    def fit(self, graph: PDGraph, parallel_calls: ParallelCalls = "sum") -> Refined:
        """Solve the least squares once for all runs, and once without each fold."""
        instance_of("graph", graph, PDGraph)
        columns = graph.columns()
        features = ProgressFeatures(
            {unit.name: number for number, unit in enumerate(columns.units)},
            graph.cost,
            parallel_calls,
        )
        seen = features.of_columns(columns)
        weights = graph.run_weights()[seen.run]
        # A run that ends in units of no cost has nothing left there, of which there is no log.
        floor = max(1e-3 * columns.run_seconds(parallel_calls).mean(), 1e-9)
        y = np.log(np.maximum(seen.remaining, floor))
        folds = [np.flatnonzero(seen.run % self.folds == fold) for fold in range(self.folds)]
        folds = [own for own in folds if own.size]
        moments = [Moments.of(seen.features[own], y[own], weights[own]) for own in folds]
        fitted = self._least_squares(Moments.merged(moments))
        predicted = fitted(seen.features)
        left_out = predicted.copy()
        if len(folds) > 1:
            for at, own in enumerate(folds):
                rest = self._least_squares(Moments.merged([*moments[:at], *moments[at + 1 :]]))
                left_out[own] = rest(seen.features[own])
        edges = np.quantile(left_out, np.arange(1, self.groups) / self.groups)
        group = np.searchsorted(edges, left_out, side="right")
        levels = (np.arange(self.atoms) + 0.5) / self.atoms
        residuals = []
        for g in range(self.groups):
            alike = group == g if (group == g).any() else group >= 0
            residuals.append(_quantiles((y - left_out)[alike], weights[alike], levels))
        span = (float(predicted.min()), float(predicted.max()))
        return Regressed(features, fitted, span, edges, np.array(residuals))

    def _least_squares(self, of: "Moments") -> "LogLinear":
        scale = np.sqrt(np.diag(of.scatter) / of.weight)
        scale[scale <= 1e-9] = np.inf  # a feature that never changes has no say
        each = of.observations / of.weight  # so that they weigh one on average
        gram = each * of.scatter / np.outer(scale, scale) + self.ridge * np.eye(scale.size)
        slopes = np.linalg.solve(gram, each * of.cross / scale) / scale
        return LogLinear(of.mean, slopes, of.level)


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
class Regressed(Refined):
    """A fitted regression, with the residuals that give its answers their spread.

    Attributes:
        features: of a progress.
        fitted: predicts log seconds.
        span: least and greatest prediction at what was learned from; no answer goes beyond.
        edges: `[groups - 1]` log seconds between groups of predictions.
        residuals: `[groups, atoms]` log factors.
    """

    features: ProgressFeatures
    fitted: LogLinear
    span: tuple[float, float]
    edges: Floats
    residuals: Floats

    @override
    def remaining(self, progress: Progress) -> Distribution:
        """Prediction times residual factors, conditioned on the current unit's seconds."""
        predicted = float(np.clip(self.fitted(self.features.of_progress(progress)), *self.span))
        group = int(np.searchsorted(self.edges, predicted, side="right"))
        at_boundary = Distribution(np.exp(predicted + self.residuals[group]))
        received = progress.current_seconds(self.features.parallel_calls)
        return at_boundary.condition(received) if received else at_boundary


def _quantiles(values: Floats, weights: Floats, levels: Floats) -> Floats:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    at = np.searchsorted(cumulative, levels * cumulative[-1])
    return values[order][at]
