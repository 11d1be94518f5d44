"""What every refinement is: a configuration, and what it makes of one graph."""

from abc import ABC, abstractmethod

from demand.distribution.distribution import Distribution
from demand.graph.pdgraph import PDGraph
from demand.units import CostModel, Demand, Progress


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
    def fit(self, graph: PDGraph, demand: Demand = "sum") -> Refined:
        """Prepare for one graph, and for one way to count parallel calls.

        Raises:
            DemandError: a graph without runs.
        """

    def remaining(
        self, graph: PDGraph, progress: Progress | None = None, demand: Demand = "sum"
    ) -> Distribution:
        """`fit(graph, demand).remaining(progress)`, for a single question."""
        return self.fit(graph, demand).remaining(progress or Progress())


def seconds_so_far(cost: CostModel, progress: Progress, demand: Demand) -> float:
    """Seconds received since the application started."""
    return cost.run_seconds(progress.executed, demand) + progress.current_seconds(demand)
