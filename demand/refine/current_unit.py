"""A prediction from the unit at which the application stands, and nothing before it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from typing_extensions import override

from demand.arguments import instance_of, renamed_keyword, set_whole_numbers
from demand.distribution.distribution import Distribution
from demand.graph.pdgraph import PDGraph
from demand.graph.walks import MAX_UNITS, Draws, WalkArrays
from demand.refine.base import Refined, Refinement
from demand.units import END, START, ParallelCalls, Progress


@final
@dataclass(frozen=True)
class CurrentUnit(Refinement):
    """Random walks from the current unit on, as `PDGraph.remaining`.

    Hermes without its correlations (arXiv 2506.14851): the remaining demand depends on where in
    the graph the application stands, and on the seconds the current unit has received, but not on
    what the units before have shown. In a loop that makes it forget how often it went round.

    Args:
        walks: random walks for each answer (1000 in the paper). Applications that have just
            finished the same unit share one answer, which `fit` computes.
        seed: of the walks.
    """

    walks: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        set_whole_numbers(self, "walks", least=1)
        set_whole_numbers(self, "seed", least=0)

    @override
    @renamed_keyword("demand", "parallel_calls")
    def fit(self, graph: PDGraph, parallel_calls: ParallelCalls = "sum") -> Refined:
        """Walk from the start and from the end of each unit."""
        instance_of("graph", graph, PDGraph)
        arrays = graph.walk_arrays(parallel_calls)
        after = {
            name: self.walk(arrays, arrays.finished(node))
            for name, node in arrays.nodes.items()
            if name != END
        }
        return _Walks(self, arrays, after, parallel_calls)

    def walk(self, arrays: WalkArrays, first: Draws) -> Distribution:
        """Seconds to the end by random walks over `arrays` whose first step draws from `first`."""
        rng = np.random.default_rng(self.seed)
        return Distribution(arrays.walk(first, rng, self.walks, MAX_UNITS))


@final
@dataclass(frozen=True)
class _Walks(Refined):
    config: CurrentUnit
    arrays: WalkArrays
    after: Mapping[str, Distribution]
    parallel_calls: ParallelCalls

    @override
    def remaining(self, progress: Progress) -> Distribution:
        first = self.arrays.first_draws(progress, self.parallel_calls)
        if progress.current is None:
            return self.after[progress.executed[-1].unit.name if progress.executed else START]
        return self.config.walk(self.arrays, first)
