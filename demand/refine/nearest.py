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

    Runs that are equally near share the places that are left for them, so that their order counts
    for nothing: before the first unit all are, and the answer is that of all runs. Beside that a
    run weighs what the graph's half-life leaves of it.

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
        features = ProgressFeatures.of_graph(columns, graph.cost, parallel_calls)
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
            columns.run,
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
        run: `[n]` number of the run of each boundary.
        left: `[n]` seconds that remained there.
        weights: `[runs]`.
        k: runs that count.
    """

    features: ProgressFeatures
    scale: Floats
    points: Floats
    squares: Floats
    starts: Ints
    run: Ints
    left: Floats
    weights: Floats
    k: int

    @override
    def remaining(self, progress: Progress) -> Distribution:
        """What remained to the nearest runs, conditioned on the current unit's seconds."""
        known = self.features.of_progress(progress) * self.scale
        distance = self.squares - 2.0 * (self.points @ known)  # the query's own square left out
        closest = np.minimum.reduceat(distance, self.starts[:-1])
        places, rounding = self._places(closest, float(known @ known))
        alike = distance <= (closest + rounding)[self.run]
        chosen = np.flatnonzero(alike & (places > 0.0)[self.run])
        run = self.run[chosen]
        share = places * self.weights / np.bincount(run, minlength=places.size).clip(1)
        at_boundary = Distribution(self.left[chosen], share[run])
        received = progress.current_seconds(self.features.parallel_calls)
        return at_boundary.condition(received) if received else at_boundary

    def _places(self, closest: Floats, square: float) -> tuple[Floats, float]:
        """How much of a place among the k each run has, `[runs]` from 0 to 1.

        Beside it up to what difference distances are equal: they are rounded, each in its own way.
        """
        if closest.size <= self.k:
            last = float(closest.max())
        else:
            last = float(np.partition(closest, self.k - 1)[self.k - 1])
        rounding = 1e-12 * (square + abs(last))
        nearer = closest < last - rounding
        level = ~nearer & (closest <= last + rounding)
        left = min(self.k, closest.size) - int(nearer.sum())
        return nearer + level * (left / int(level.sum())), rounding
