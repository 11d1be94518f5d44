"""What every refinement is: a configuration, and what it makes of one graph."""

from abc import ABC, abstractmethod

from demand.arguments import renamed_keyword
from demand.distribution.distribution import Distribution
from demand.graph.pdgraph import PDGraph
from demand.units import CostModel, ParallelCalls, Progress


class Refined(ABC):
    """What a refinement made of a graph: answers for any progress, and does not change.

    Runs that the graph observes later are not in it; fit anew to take them in.
    """

    @abstractmethod
    def remaining(self, progress: Progress) -> Distribution:
        """Distribution of the seconds that an application at `progress` still needs.

        Raises:
            DemandError: a unit that the graph does not know.
        """


class Refinement(ABC):
    """How what a running application has shown changes what is known of the rest.

    A refinement is configuration only: a frozen dataclass that is shared freely. What it computes
    once per graph is the `Refined` that `fit` gives.
    """

    @abstractmethod
    @renamed_keyword("demand", "parallel_calls")
    def fit(self, graph: PDGraph, parallel_calls: ParallelCalls = "sum") -> Refined:
        """Prepare for one graph, and for one way to count parallel calls.

        Raises:
            DemandError: a graph without runs.
        """

    @renamed_keyword("demand", "parallel_calls")
    def remaining(
        self,
        graph: PDGraph,
        progress: Progress | None = None,
        parallel_calls: ParallelCalls = "sum",
    ) -> Distribution:
        """`fit(graph, parallel_calls).remaining(progress)`, for a single question."""
        progress = Progress() if progress is None else progress
        return self.fit(graph, parallel_calls).remaining(progress)


def seconds_so_far(cost: CostModel, progress: Progress, parallel_calls: ParallelCalls) -> float:
    """Seconds received since the application started."""
    return cost.run_seconds(progress.executed, parallel_calls) + progress.current_seconds(
        parallel_calls
    )
