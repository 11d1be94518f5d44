"""A prediction by regression on what a run has shown at the boundaries between its units."""

from dataclasses import astuple, dataclass
from typing import final

from typing_extensions import override

from demand.arguments import instance_of, renamed_keyword
from demand.distribution.distribution import Distribution
from demand.graph.pdgraph import PDGraph
from demand.refine.base import Refined, Refinement
from demand.refine.features import ProgressFeatures
from demand.refine.log_ridge import LogFit, LogRidge, RidgeSettings
from demand.units import ParallelCalls, Progress


@final
@dataclass(frozen=True)
class ProgressRegression(RidgeSettings, Refinement):
    """Predicts by a ridge regression of the logarithm of the remaining seconds on progress.

    Ours, not from a paper. Every boundary between two units of every remembered run is one
    observation; `ProgressFeatures` lists what is known there. The answer is a distribution with an
    empirical spread (`LogRidge`). While a unit runs, the answer at its start is conditioned on the
    seconds it has received.

    Arguments and errors are those of `RidgeSettings`.
    """

    @override
    @renamed_keyword("demand", "parallel_calls")
    def fit(self, graph: PDGraph, parallel_calls: ParallelCalls = "sum") -> Refined:
        """Solve the least squares once for all runs, and once without each fold."""
        instance_of("graph", graph, PDGraph)
        columns = graph.columns()
        features = ProgressFeatures.of_graph(columns, graph.cost, parallel_calls)
        seen = features.of_columns(columns)
        weights = graph.run_weights()[seen.run]
        # A run that ends in units of no cost has nothing left there.
        least = 1e-3 * columns.run_seconds(parallel_calls).mean()
        predicted = LogRidge(*astuple(self)).fit(
            seen.features, seen.remaining, run=seen.run, weights=weights, least=least
        )
        return Regressed(features, predicted)


@final
@dataclass(frozen=True, eq=False)
class Regressed(Refined):
    """A fitted regression on progress.

    Attributes:
        features: of a progress.
        predicted: from them, the seconds that remain.
    """

    features: ProgressFeatures
    predicted: LogFit

    @override
    def remaining(self, progress: Progress) -> Distribution:
        """Prediction times residual factors, conditioned on the current unit's seconds."""
        at_boundary = self.predicted(self.features.of_progress(progress))
        received = progress.current_seconds(self.features.parallel_calls)
        return at_boundary.condition(received) if received else at_boundary
