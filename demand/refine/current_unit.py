"""Walks from where the application stands."""

from dataclasses import dataclass
from typing import final

from demand.distribution import Distribution
from demand.graph import PDGraph
from demand.refine.base import Refined, Refinement
from demand.units import Demand, Progress


@final
@dataclass(frozen=True)
class CurrentUnit(Refinement):
    """Random walks from the current unit on, as `PDGraph.remaining`.

    Hermes without its correlations (arXiv 2506.14851): the remaining demand depends on where in
    the graph the application stands, and on the seconds the current unit has received, but not on
    what the units before have shown. In a loop that makes it forget how often it went round.

    Args:
        walks: random walks for each question (1000 in the paper).
        seed: of the walks.
    """

    walks: int = 1000
    seed: int = 0

    def fit(self, graph: PDGraph, demand: Demand = "sum") -> Refined:
        """Lay out the samples."""
        graph.walk_arrays(demand)
        return _Walks(graph, self, demand)


@final
@dataclass(frozen=True)
class _Walks(Refined):
    graph: PDGraph
    config: CurrentUnit
    demand: Demand

    def remaining(self, progress: Progress) -> Distribution:
        return self.graph.remaining(
            progress, demand=self.demand, walks=self.config.walks, seed=self.config.seed
        )
