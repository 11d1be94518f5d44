"""The baseline of all refinements: progress counts by its seconds alone."""

from dataclasses import dataclass
from typing import final

from typing_extensions import override

from demand.arguments import instance_of, renamed_keyword, set_whole_numbers
from demand.distribution.distribution import Distribution
from demand.graph.pdgraph import PDGraph
from demand.refine.base import Refined, Refinement, seconds_so_far
from demand.units import CostModel, ParallelCalls, Progress


@final
@dataclass(frozen=True)
class NoRefinement(Refinement):
    """Predicts from the seconds received alone, out of random walks over the whole application.

    What the public artifact of Hermes (arXiv 2506.14851) ranks by: which units have run does not
    matter, only their seconds. The baseline of every refinement.

    Args:
        walks: random walks that the distribution is made of (1000 in the paper).
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
        """Walk the graph once from its start."""
        instance_of("graph", graph, PDGraph)
        whole = graph.remaining(parallel_calls=parallel_calls, walks=self.walks, seed=self.seed)
        return AgedDistribution(whole, graph.cost, parallel_calls)


@final
@dataclass(frozen=True)
class AgedDistribution(Refined):
    """The distribution of an application's total seconds, conditioned on the seconds received."""

    total: Distribution
    cost: CostModel
    parallel_calls: ParallelCalls

    @override
    def remaining(self, progress: Progress) -> Distribution:
        """The total, given that it exceeds what was received, less that.

        Beyond the largest sample it is `extrapolated`, by the doubling rule.
        """
        return self.total.condition(seconds_so_far(self.cost, progress, self.parallel_calls))
