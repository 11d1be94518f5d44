"""What every refinement is: a configuration, what it makes of one graph, and who asks."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from demand.arguments import instance_of, renamed_keyword
from demand.distribution.distribution import Distribution
from demand.graph.pdgraph import PDGraph
from demand.refine.predictor import PendingCall
from demand.units import CostModel, ParallelCalls, Progress

Estimator = Callable[[str, Progress], Distribution]
"""What a scheduler asks as a job goes on: the name of its application and how far it has come, to
the seconds it still needs. A `DemandEstimator` is one. A `Predictor` is asked about a call that
comes, instead, and may read its prompt."""


class Refined(ABC):
    """A refinement prepared for one graph: it answers how much any progress leaves to do.

    It does not change: runs that the graph observes later are not in it. Fit the refinement anew
    to take them in.
    """

    @abstractmethod
    def remaining(self, progress: Progress) -> Distribution:
        """Distribution of the seconds that an application at `progress` still needs.

        Raises:
            DemandError: a unit that the graph does not know.
        """

    def predict(self, call: PendingCall) -> Distribution:
        """The same for an application that is about to make `call`, which is included.

        `remaining(call.progress)` here: most refinements do not look at what comes.
        """
        return self.remaining(call.progress)


class Refinement(ABC):
    """A way to predict what a running application still needs from what it has shown so far.

    A refinement is configuration only: a frozen dataclass that is shared freely. What it computes
    once per graph is the `Refined` that `fit` gives.
    """

    @abstractmethod
    @renamed_keyword("demand", "parallel_calls")
    def fit(self, graph: PDGraph, parallel_calls: ParallelCalls = "sum") -> Refined:
        """Prepare for one graph as it is: what it observes later takes another `fit`.

        Args:
            graph: the demand graph of the application, with runs.
            parallel_calls: whether calls made side by side count by their "sum" or by the longest
                of them ("critical_path").

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
        progress = Progress() if progress is None else instance_of("progress", progress, Progress)
        return self.fit(graph, parallel_calls).remaining(progress)


def seconds_so_far(cost: CostModel, progress: Progress, parallel_calls: ParallelCalls) -> float:
    """Seconds received since the application started."""
    instance_of("progress", progress, Progress)
    return cost.run_seconds(progress.executed, parallel_calls) + progress.current_seconds(
        parallel_calls
    )
