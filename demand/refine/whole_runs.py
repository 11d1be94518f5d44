"""A prediction from the totals of whole remembered runs, without random walks."""

from dataclasses import dataclass
from typing import final

from typing_extensions import override

from demand.arguments import instance_of, renamed_keyword
from demand.distribution.distribution import Distribution
from demand.graph.pdgraph import PDGraph
from demand.refine.base import Refined, Refinement
from demand.refine.no_refinement import AgedDistribution
from demand.units import ParallelCalls


@final
@dataclass(frozen=True)
class WholeRuns(Refinement):
    """Predicts from the seconds received alone, out of the totals of the remembered runs.

    Ours, not from a paper. Like `NoRefinement`, but a run is kept whole. A random walk draws each
    unit anew; where runs differ from each other (one task is long throughout, another short),
    walks average the difference out and their totals vary less than those of real runs.
    """

    @override
    @renamed_keyword("demand", "parallel_calls")
    def fit(self, graph: PDGraph, parallel_calls: ParallelCalls = "sum") -> Refined:
        """Add up each remembered run."""
        instance_of("graph", graph, PDGraph)
        columns = graph.columns()
        total = Distribution(columns.run_seconds(parallel_calls), graph.run_weights())
        return AgedDistribution(total, graph.cost, parallel_calls)
