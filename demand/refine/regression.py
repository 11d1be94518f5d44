"""Regression of the remaining demand on progress."""

from dataclasses import dataclass
from typing import final

import numpy as np

from demand.atoms import Floats
from demand.distribution import Distribution
from demand.errors import DemandError
from demand.graph import PDGraph
from demand.refine.base import Refined, Refinement
from demand.refine.features import ProgressFeatures
from demand.units import Demand, Progress


@final
@dataclass(frozen=True)
class ProgressRegression(Refinement):
    """Ridge regression of log remaining seconds on what a run has shown, at unit boundaries.

    Ours, not from a paper. Every boundary between two units of every remembered run is one
    observation (`demand.refine.features` lists what is known there). The answer is the prediction
    times the residual factors of the observations that were predicted alike: the spread is
    empirical and may change with the prediction. Within a unit, the answer at its start is
    conditioned on the seconds received since.

    Args:
        ridge: penalty on the squared standardised coefficients, in observations.
        atoms: of each answer: equally likely quantiles of the residuals.
        groups: observations are grouped by their prediction, into so many groups of one size.

    Raises:
        DemandError: a negative ridge, or atoms or groups below 1.
    """

    ridge: float = 10.0
    atoms: int = 50
    groups: int = 10

    def __post_init__(self) -> None:
        if not 0.0 <= self.ridge < np.inf:
            raise DemandError(f"ridge is {self.ridge}; expected a finite number of at least 0")
        for name in ("atoms", "groups"):
            if getattr(self, name) < 1:
                raise DemandError(f"{name} is {getattr(self, name)}; expected at least 1")

    def fit(self, graph: PDGraph, demand: Demand = "sum") -> Refined:
        """Solve the least squares once: O(executions * units^2)."""
        columns = graph.columns()
        features = ProgressFeatures(
            {unit.name: number for number, unit in enumerate(columns.units)}, graph.cost, demand
        )
        seen = features.of_columns(columns)
        weights = graph.run_weights()[seen.run]
        weights = weights / weights.mean()
        mean = np.average(seen.features, axis=0, weights=weights)
        centred = seen.features - mean
        scale = np.sqrt(np.average(centred**2, axis=0, weights=weights))
        scale[scale <= 1e-9] = np.inf  # a feature that never changes has no say
        x = centred / scale
        # A run that ends in units of no cost has nothing left there, of which there is no log.
        floor = max(1e-3 * columns.run_seconds(demand).mean(), 1e-9)
        y = np.log(np.maximum(seen.remaining, floor))
        level = np.average(y, weights=weights)
        gram = (x * weights[:, None]).T @ x + self.ridge * np.eye(x.shape[1])
        slopes = np.linalg.solve(gram, (x * weights[:, None]).T @ (y - level)) / scale
        predicted = level + centred @ slopes
        edges = np.quantile(predicted, np.arange(1, self.groups) / self.groups)
        group = np.searchsorted(edges, predicted, side="right")
        levels = (np.arange(self.atoms) + 0.5) / self.atoms
        residuals = np.array(
            [
                _quantiles((y - predicted)[group == g], weights[group == g], levels)
                if (group == g).any()
                else _quantiles(y - predicted, weights, levels)
                for g in range(self.groups)
            ]
        )
        return Regressed(features, mean, slopes, float(level), edges, residuals)


@final
@dataclass(frozen=True, eq=False)
class Regressed(Refined):
    """Coefficients and residuals of the regression.

    Attributes:
        features: of a progress.
        mean: `[d]` of the features.
        slopes: `[d]` log seconds per unit of a feature.
        level: log seconds at the mean.
        edges: `[groups - 1]` log seconds between groups of predictions.
        residuals: `[groups, atoms]` log factors.
    """

    features: ProgressFeatures
    mean: Floats
    slopes: Floats
    level: float
    edges: Floats
    residuals: Floats

    def remaining(self, progress: Progress) -> Distribution:
        """Prediction times residual factors, conditioned on the current unit's seconds."""
        known = self.features.of_progress(progress)
        predicted = self.level + float((known - self.mean) @ self.slopes)
        group = int(np.searchsorted(self.edges, predicted, side="right"))
        at_boundary = Distribution(np.exp(predicted + self.residuals[group]))
        received = progress.current_seconds(self.features.demand)
        return at_boundary.condition(received) if received else at_boundary


def _quantiles(values: Floats, weights: Floats, levels: Floats) -> Floats:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    at = np.searchsorted(cumulative, levels * cumulative[-1])
    return values[order][at]
