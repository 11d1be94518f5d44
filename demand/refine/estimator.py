"""What a scheduler asks for the remaining demand of any application, known to it or not."""

import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import NamedTuple, final

from demand.arguments import instance_of, mapping_of, renamed_keyword
from demand.distribution.distribution import Distribution
from demand.distribution.never_seen import unseen
from demand.errors import DemandError
from demand.graph.pdgraph import PDGraph
from demand.refine.base import Refined, Refinement, seconds_so_far
from demand.refine.estimator_file import EstimatorRecord, read_estimator, write_estimator
from demand.refine.no_refinement import NoRefinement
from demand.refine.predictor import PendingCall
from demand.seconds import one_number
from demand.units import (
    CostModel,
    Execution,
    ParallelCalls,
    Progress,
    check_parallel_calls,
)


@final
class DemandEstimator:
    """Answers `(application, progress)` with a distribution of the remaining seconds.

    It holds a graph per application and one refinement, and never fails for want of knowledge;
    `fallbacks` counts the questions it had no runs for:

    - an application without a finished run: nothing is known but the seconds it has received, so
      the answer is the doubling rule of `beyond_samples`, `extrapolated`, from which
      `Job.expect` takes nothing: ranks follow attained service (least attained service first, in
      powers of two), for it and all others like it;
    - a unit of a progress that its graph has not seen: the units are left out of account, and
      the answer is that of `NoRefinement`;
    - a call ahead (`predict`) of a unit that its graph has not seen: the call is left out of
      account, and the answer is that at its progress.

    Graphs keep learning through `observe`. What a refinement prepared from n runs is made anew at
    the first question where more than `lag` n have been observed since, or that names a unit which
    came since; with a half-life of h runs n is h at most. So an observation costs the work of its
    own run and its share of a preparation. An answer rests on the runs as they were r <= lag n
    observations ago. The empirical distribution of these gives no event a probability that differs
    from that of all n + r runs by more than r / (n + r) <= lag / (1 + lag), the share of the runs
    left out; where a full window has forgotten r meanwhile, by r / n <= lag; with a half-life
    by the weight of the runs left out, (1 - 2^(-r / h)) / (1 - 2^(-(n + r) / h)) <= 2 ln(2) lag.

    Args:
        graphs: by application; they are taken over, and change with `observe`.
        refinement: asked where there is a graph and it knows all units.
        parallel_calls: how parallel calls count.
        cost: seconds of an execution, for applications without a graph.
        lag: runs that an answer may leave out, over those that it rests on; 0 for none.

    Raises:
        DemandError: a lag that is negative or not finite, an unknown way to count parallel calls,
            or what is no graph, refinement (a class in place of an instance of it, for one) or
            cost model.

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
        lag: float = 0.125,
    ) -> None:
        check_parallel_calls(parallel_calls)
        self.lag = one_number("lag", lag)
        if not 0.0 <= self.lag < math.inf:
            raise DemandError(
                f"lag is {lag}; expected a share of the remembered runs, such as 0.125, or 0 to "
                "answer from all of them"
            )
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
        self._prepared: dict[tuple[str, Refinement], _Prepared] = {}

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
        refined = self._refined(application, progress)
        if refined is None:
            return unseen(seconds_so_far(self.cost, progress, self.parallel_calls))
        return refined.remaining(progress)

    def predict(self, call: PendingCall) -> Distribution:
        """The same from a call before its first token, included in what is predicted.

        Only refinements that look at what comes say more than at the progress alone
        (`PromptRegression`). A unit that the graph knows in one stage alone, beside others, is
        taken for the first of that stage, with a call of each. Where it knows none, or several, the
        answer is that at the progress.
        """
        progress = instance_of("call", call, PendingCall).progress
        if (graph := self.graphs.get(call.application)) is not None:
            call = _by_stage(call, graph)
        refined = self._refined(call.application, progress, call.unit.name)
        if refined is None:
            return unseen(seconds_so_far(self.cost, progress, self.parallel_calls))
        if call.unit.name not in self.graphs[call.application].known:
            return refined.remaining(progress)
        return refined.predict(call)

    def _refined(
        self, application: str, progress: Progress, ahead: str | None = None
    ) -> Refined | None:
        """Whom to ask about `application` at `progress`; `None` where no run of it was seen."""
        graph = self.graphs.get(application)
        if graph is None or not (known := graph.known):
            self.fallbacks[application, "application"] += 1
            return None
        ran = {execution.unit.name for execution in progress.executed}
        if progress.current is not None:
            ran.add(progress.current)
        named = ran if ahead is None else ran | {ahead}
        if not named <= known:
            self.fallbacks[application, "unit"] += 1
        refinement, named = self.refinement, named & known
        if not ran <= known:
            refinement, named = NoRefinement(), set()  # which leaves the units out of account
        key = application, refinement
        prepared = self._prepared.get(key)
        if prepared is None or not prepared.answers(graph, named, self.lag):
            refined = refinement.fit(graph, self.parallel_calls)
            half_life = math.inf if graph.half_life_runs is None else graph.half_life_runs
            runs = min(len(graph.runs), half_life)
            prepared = _Prepared(refined, graph, graph.observed, runs, known)
            self._prepared[key] = prepared
        return prepared.refined

    def observe(self, application: str, run: Sequence[Execution]) -> None:
        """Learn from a finished run; the first of an application starts its graph.

        Raises:
            DemandError: as `PDGraph.observe`.
        """
        graph = self.graphs.get(application) or PDGraph(application, cost=self.cost)
        graph.observe(run)
        self.graphs[application] = graph

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write its graphs and settings to `path` as JSON; a reader never sees half a file.

        The refinement is code, and is not in it.

        Raises:
            DemandError: a path that is a folder, or in a folder that is missing.
        """
        graphs = {name: graph.record() for name, graph in self.graphs.items()}
        record = EstimatorRecord(graphs, self.parallel_calls, self.cost, self.lag)
        write_estimator(path, record)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], refinement: Refinement | None = None
    ) -> "DemandEstimator":
        """Read what `save` wrote, to ask `refinement` again.

        Raises:
            DemandError: not such a file, another format version, or a broken entry.
            FileNotFoundError: no file at `path`.
        """
        record = read_estimator(path)
        graphs = {name: PDGraph.of_record(graph) for name, graph in record.graphs.items()}
        return cls(graphs, refinement, record.parallel_calls, record.cost, record.lag)

    def __repr__(self) -> str:
        runs = ", ".join(f"{name!r}: {len(graph.runs)} runs" for name, graph in self.graphs.items())
        return f"DemandEstimator({{{runs}}}, {self.refinement!r}, {self.parallel_calls!r})"


def _by_stage(call: PendingCall, graph: PDGraph) -> PendingCall:
    """`call` as its stage, where its unit is known in one alone, of calls; else as it is."""
    if call.unit.name in graph.known:
        return call
    stages = [stage for stage in graph.units if call.unit in graph.members(stage)]
    if len(stages) != 1 or stages[0].kind != "llm":
        return call
    calls = max(call.parallelism, len(graph.members(stages[0])))
    return replace(call, unit=stages[0], parallelism=calls)


class _Prepared(NamedTuple):
    """What a refinement made of a graph, and what the graph had seen by then."""

    refined: Refined
    graph: PDGraph
    observed: int
    runs: float
    known: frozenset[str]

    def answers(self, graph: PDGraph, named: Set[str], lag: float) -> bool:
        """Whether it may still be asked about `graph`, by a question that names these units."""
        since = graph.observed - self.observed
        return graph is self.graph and since <= lag * self.runs and named <= self.known
