"""A prediction from the unit at which the application stands, and nothing before it."""

from dataclasses import dataclass, field
from typing import final

from typing_extensions import override

from demand.arguments import instance_of, renamed_keyword, set_whole_numbers
from demand.distribution.distribution import Distribution
from demand.graph.pdgraph import PDGraph
from demand.graph.walk_table import WalkTable
from demand.graph.walks import MAX_UNITS
from demand.refine.base import Refined, Refinement
from demand.units import START, ParallelCalls, Progress


@final
@dataclass(frozen=True)
class CurrentUnit(Refinement):
    """Random walks from the current unit on, as `PDGraph.remaining`.

    Hermes without its correlations (arXiv 2506.14851): the remaining demand depends on where in
    the graph the application stands, and on the seconds the current unit has received, but not on
    what the units before have shown. In a loop that makes it forget how often it went round.

    Args:
        walks: random walks for each answer (1000 in the paper), drawn from each unit at the first
            question that needs them (`WalkTable`). Applications that have just finished the same
            unit share one answer.
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
        """Take the samples of the graph; walks are drawn as they are needed."""
        instance_of("graph", graph, PDGraph)
        arrays = graph.walk_arrays(parallel_calls)
        return _Walks(WalkTable(arrays, self.walks, self.seed, MAX_UNITS), parallel_calls)


@final
@dataclass(frozen=True)
class _Walks(Refined):
    table: WalkTable
    parallel_calls: ParallelCalls
    after: dict[str, Distribution] = field(default_factory=dict)  # by the unit that has finished

    @override
    def remaining(self, progress: Progress) -> Distribution:
        first = self.table.arrays.first_draws(progress, self.parallel_calls)
        if progress.current is not None:
            return Distribution(self.table.totals(first))
        last = progress.executed[-1].unit.name if progress.executed else START
        if last not in self.after:
            self.after[last] = Distribution(self.table.totals(first))
        return self.after[last]
