"""A prediction from the remembered runs that looked most alike."""

from dataclasses import dataclass
from typing import final

import numpy as np
from typing_extensions import override

from demand.arguments import instance_of, renamed_keyword, set_whole_numbers
from demand.distribution.distribution import Distribution
from demand.graph.pdgraph import PDGraph
from demand.graph.run_columns import Ints
from demand.refine.base import Refined, Refinement
from demand.refine.features import ProgressFeatures
from demand.seconds import Floats
from demand.units import ParallelCalls, Progress


@final
@dataclass(frozen=True)
class NearestRuns(Refinement):
    """Predicts what remained to the remembered runs, at the moment they looked most like this one.

    Ours, not from a paper. Every boundary between two units of a remembered run is a point, with
    the features of `ProgressRegression`, standardised; the nearest in Euclidean distance count, so
    that no shape is assumed of the demand. Of each run only its nearest boundary counts, since
    neighbouring boundaries of a run say almost the same.

    Args:
        k: runs that count; all, where fewer are remembered.

    Raises:
        DemandError: k below 1.
    """

    k: int = 50

    def __post_init__(self) -> None:
        set_whole_numbers(self, "k", least=1)

    @override
    @renamed_keyword("demand", "parallel_calls")
    def fit(self, graph: PDGraph, parallel_calls: ParallelCalls = "sum") -> Refined:
        """Standardise the features of every boundary."""
        instance_of("graph", graph, PDGraph)
        columns = graph.columns()
        features = ProgressFeatures(
            {unit.name: number for number, unit in enumerate(columns.units)},
            graph.cost,
            parallel_calls,
        )
        seen = features.of_columns(columns)
        deviation = seen.features.std(axis=0)
        scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 1e-9)
        points = seen.features * scale
        return Neighbours(
            features,
            scale,
            points,
            (points**2).sum(axis=1),
            columns.starts,
            seen.remaining,
            graph.run_weights(),
            self.k,
        )


@final
@dataclass(frozen=True, eq=False)
class Neighbours(Refined):
    """The boundaries between the units of the remembered runs, to be searched for the nearest.

    Attributes:
        features: of a progress.
        scale: `[d]` that standardises them.
        points: `[n, d]` standardised features of the boundaries.
        squares: `[n]` their squared lengths.
        starts: `[runs + 1]`; run r has the boundaries `starts[r]` up to `starts[r + 1]`.
        left: `[n]` seconds that remained there.
        weights: `[runs]`.
        k: runs that count.
    """

    features: ProgressFeatures
    scale: Floats
    points: Floats
    squares: Floats
    starts: Ints
    left: Floats
    weights: Floats
    k: int

    @override
    def remaining(self, progress: Progress) -> Distribution:
        """What remained to the nearest runs, conditioned on the current unit's seconds."""
        known = self.features.of_progress(progress) * self.scale
        distance = self.squares - 2.0 * (self.points @ known)  # the query's own square left out
        starts = self.starts
        closest = np.minimum.reduceat(distance, starts[:-1])
        nearest = np.argsort(closest, kind="stable")[: self.k]
        chosen = [starts[r] + distance[starts[r] : starts[r + 1]].argmin() for r in nearest]
        at_boundary = Distribution(self.left[chosen], self.weights[nearest])
        received = progress.current_seconds(self.features.parallel_calls)
        return at_boundary.condition(received) if received else at_boundary
