"""What a scheduler asks for the remaining demand of any application, known to it or not."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import final

from demand.arguments import instance_of, mapping_of, renamed_keyword
from demand.distribution.distribution import Distribution
from demand.distribution.never_seen import unseen
from demand.graph.pdgraph import PDGraph
from demand.refine.base import Refined, Refinement, seconds_so_far
from demand.refine.no_refinement import NoRefinement
from demand.units import CostModel, Execution, ParallelCalls, Progress, check_parallel_calls


@final
class DemandEstimator:
    """Answers `(application, progress)` with a distribution of the remaining seconds.

    It holds a graph per application and one refinement, and never fails for want of knowledge;
    `fallbacks` counts the questions it had no runs for:

    - an application without a finished run: nothing is known but the seconds it has received, so
      the answer is the doubling rule of `beyond_samples`, `extrapolated`, from which
      `Job.learn` takes nothing: ranks follow attained service (least attained service first, in
      powers of two), for it and all others like it;
    - a unit that its graph has not seen: the units are left out of account, and the answer is
      that of `NoRefinement`.

    Graphs keep learning through `observe`; what a refinement prepared is made anew at the next
    question about that application.

    Args:
        graphs: by application; they are taken over, and change with `observe`.
        refinement: asked where there is a graph and it knows all units.
        parallel_calls: how parallel calls count.
        cost: seconds of an execution, for applications without a graph.

    Raises:
        DemandError: an unknown way to count parallel calls, or what is no graph, refinement (a
            class in place of an instance of it, for one) or cost model.

    Attributes:
        fallbacks: questions answered by a fallback, by (application, reason); the reason is
            "application" or "unit".
    """

    @renamed_keyword("demand", "parallel_calls")
    def __init__(
        self,
        graphs: Mapping[str, PDGraph],
        refinement: Refinement | None = None,
        parallel_calls: ParallelCalls = "sum",
        cost: CostModel | None = None,
    ) -> None:
        check_parallel_calls(parallel_calls)
        self.graphs = {
            name: instance_of(f"graph of {name!r}", graph, PDGraph)
            for name, graph in mapping_of("graphs", graphs, "a PDGraph by application").items()
        }
        self.refinement = (
            NoRefinement()
            if refinement is None
            else instance_of("refinement", refinement, Refinement)  # type: ignore[type-abstract]
        )
        self.parallel_calls = parallel_calls
        self.cost = CostModel() if cost is None else instance_of("cost", cost, CostModel)
        self.fallbacks: Counter[tuple[str, str]] = Counter()
        self._refined: dict[tuple[str, Refinement], Refined] = {}

    @property
    def demand(self) -> ParallelCalls:
        """The old name of `parallel_calls`."""
        message = "DemandEstimator.demand is now parallel_calls; it goes with the next release"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return self.parallel_calls

    def __call__(self, application: str, progress: Progress | None = None) -> Distribution:
        """Distribution of the seconds that `application` at `progress` still needs.

        Raises:
            DemandError: a progress that contradicts itself.
        """
        progress = Progress() if progress is None else instance_of("progress", progress, Progress)
        graph = self.graphs.get(application)
        if graph is None or not graph.units:
            self.fallbacks[application, "application"] += 1
            return unseen(seconds_so_far(self.cost, progress, self.parallel_calls))
        ran = {execution.unit.name for execution in progress.executed}
        if progress.current is not None:
            ran.add(progress.current)
        refinement = self.refinement
        if not ran <= {unit.name for unit in graph.units}:
            self.fallbacks[application, "unit"] += 1
            refinement = NoRefinement()
        key = application, refinement
        if key not in self._refined:
            self._refined[key] = refinement.fit(graph, self.parallel_calls)
        return self._refined[key].remaining(progress)

    def observe(self, application: str, run: Sequence[Execution]) -> None:
        """Learn from a finished run; the first of an application starts its graph.

        Raises:
            DemandError: as `PDGraph.observe`.
        """
        graph = self.graphs.get(application) or PDGraph(application, cost=self.cost)
        graph.observe(run)
        self.graphs[application] = graph
        self._refined = {key: kept for key, kept in self._refined.items() if key[0] != application}
