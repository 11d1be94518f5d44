"""The probabilistic demand graph of an application, learned from its runs."""

import math
import os
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, final

import numpy as np

from demand.arguments import (
    instance_of,
    mapping_of,
    renamed_keyword,
    warn_renamed_method,
    whole_number,
)
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.graph.file_format import GraphRecord, read_graph, write_graph
from demand.graph.given_units import GivenUnit, check_given, given_arrays
from demand.graph.kinds import check_kind
from demand.graph.run_columns import RunArrays, RunColumns, decayed
from demand.graph.walk_table import WalkTable
from demand.graph.walks import MAX_UNITS, WalkArrays
from demand.plotting import svg
from demand.seconds import Floats, one_number
from demand.stages import by_stage, in_line, in_stages
from demand.units import (
    CostModel,
    Execution,
    ParallelCalls,
    Progress,
    Unit,
    check_parallel_calls,
    check_run,
    says_nothing,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from networkx import DiGraph

Run = tuple[Execution, ...]

SHOWN_UNITS, SHOWN_RUNS = 30, 2000
"""The most units and runs of a graph whose picture a notebook shows by itself."""


@final
class PDGraph:
    """Probabilistic demand graph of one application (PDGraph of Hermes, arXiv 2506.14851).

    A node is a unit, with the samples of its executions; an edge is weighted by how often one unit
    followed another; loops are edges that lead back. The remaining demand of an application is
    found by random walks from the unit at which it stands to the end. A step of a walk depends on
    the unit it is at alone; to use what the units before have shown is left to `demand.refine`.

    Of a run with units side by side (`Execution.after`) it learns the stages (`demand.stages`): a
    node is then a stage, such as "math + search", and a walk goes from stage to stage. The sum over
    a run is kept; the critical path is taken as if each stage waited for all of the last one.

    Departures from the paper's artifact: a sample keeps tokens, parallelism, seconds and successor
    together, where the artifact draws each on its own; walks have no silent cap of 50 units; the
    window counts whole runs, where the artifact keeps 1000 samples per attribute, which for a
    unit in a loop are a few runs only.

    Build one with `PDGraph.fit` and keep it current with `observe`; or give its probabilities
    with `PDGraph.from_units`, and draw from it with `draw_runs`.

    Args:
        name: of the application, for messages and for people.
        window: runs remembered; the oldest leave first.
        cost: seconds of an execution.
        half_life_runs: a remembered run weighs half as much after this many more; `None` weighs
            all alike. The window bounds memory, the half-life says how fast to forget.

    Raises:
        DemandError: a window below 1, or a half-life that is not positive and finite.
    """

    def __init__(
        self,
        name: str = "application",
        window: int = 1000,
        cost: CostModel | None = None,
        half_life_runs: float | None = None,
    ) -> None:
        if half_life_runs is not None:
            half_life_runs = one_number("half_life_runs", half_life_runs)
            if not 0.0 < half_life_runs < math.inf:
                raise DemandError(
                    f"half_life_runs is {half_life_runs}; expected a positive number of runs, or "
                    "None to weigh all remembered runs alike"
                )
        self.name = instance_of("name", name, str)
        self.window = whole_number("window", window, least=1)
        self.cost = CostModel() if cost is None else instance_of("cost", cost, CostModel)
        self.half_life_runs = half_life_runs
        self._runs: deque[Run] = deque(maxlen=self.window)
        self._stages: deque[Run] = deque(maxlen=self.window)  # of each run; of a sequence, itself
        self._run_arrays: deque[RunArrays] = deque(maxlen=self.window)
        self._observed = 0
        self._executed: Counter[str] = Counter()  # of the remembered runs, by unit
        self._kinds: dict[str, Unit] = {}  # every unit ever seen, and every stage
        self._members: dict[str, tuple[Unit, ...]] = {}  # of each stage of several
        self._given: tuple[tuple[GivenUnit, ...], dict[str, float]] | None = None
        self._columns: RunColumns | None = None  # made at the first need after a change
        self._arrays: dict[ParallelCalls, WalkArrays] = {}
        self._table: WalkTable | None = None  # of the last question

    @classmethod
    def fit(
        cls,
        runs: Iterable[Sequence[Execution]],
        *,
        name: str = "application",
        window: int = 1000,
        cost: CostModel | None = None,
        half_life_runs: float | None = None,
    ) -> "PDGraph":
        """A new graph of finished runs of one application, oldest first.

        It has observed each of them; `observe` is for those that finish later, one at a time.
        (`Refinement.fit` prepares answers from a graph as it then is.)

        A finished run ends, so that from every unit of it the end is reached. A run that was cut
        off must not be among them: its last unit would count as one after which runs end.

        Raises:
            DemandError: no runs, an empty run, what is no run (a run is a list of executions), or
                a unit name with two kinds.
        """
        graph = cls(name, window, cost, half_life_runs)
        if not isinstance(runs, Iterable):
            raise DemandError(f"runs is {runs!r:.200}; expected a list of runs, each of executions")
        for run in runs:
            graph.observe(run)
        if not graph._runs:
            raise DemandError("there are no runs to fit a graph to; pass at least one finished run")
        return graph

    @classmethod
    def from_units(
        cls,
        units: Sequence[GivenUnit],
        entries: Mapping[str, float],
        *,
        name: str = "application",
        cost: CostModel | None = None,
    ) -> "PDGraph":
        """A graph of given probabilities, such as the published profile of an application.

        It has no runs, so it does not `observe` and nothing can be refined by it. To learn on
        from it, fit another one to `draw_runs` of it.

        Args:
            units: each with its executions and the probabilities of what follows.
            entries: probability of each first unit, of sum 1.
            name: of the application.
            cost: seconds of an execution.

        Raises:
            DemandError: probabilities that do not sum to 1, a successor that is no unit, a unit
                given twice, or a loop with no way out.
        """
        entries = mapping_of("entries", entries, "the probability of each first unit, by name")
        check_given(units, entries)
        graph = cls(name, cost=cost)
        graph._given = (tuple(units), entries)
        graph.walk_arrays()
        return graph

    def observe(self, run: Sequence[Execution]) -> None:
        """Learn from one more finished run; where the window is full the oldest is forgotten.

        Raises:
            DemandError: an empty run, what is no list of executions, a unit name with two kinds,
                one that waits for a unit which is not before it, or a graph of given
                probabilities. The graph is then unchanged.
        """
        if self._given is not None:
            raise DemandError(
                f"graph {self.name!r} was given its probabilities and does not learn; fit a new "
                "one to `draw_runs` of it, and let that observe"
            )
        executed = check_run("run", run)
        if not executed:
            raise DemandError("the run is empty; pass the units it executed, in order")
        staged = executed if says_nothing(executed) else in_stages(executed, self.cost)
        kinds = dict(self._kinds)
        for execution in executed if staged is executed else (*executed, *staged):
            kinds.setdefault(execution.unit.name, execution.unit)
            check_kind(execution.unit, kinds)
        self._kinds = kinds
        if staged is not executed:
            for stage, units in zip(staged, by_stage(executed), strict=True):
                self._members[stage.unit.name] = tuple({one.unit: None for one in units})
        if len(self._runs) == self.window:
            self._executed -= Counter(execution.unit.name for execution in self._stages[0])
        self._executed.update(execution.unit.name for execution in staged)
        self._runs.append(executed)
        self._stages.append(staged)
        numbers = {name: number for number, name in enumerate(kinds)}
        self._run_arrays.append(RunArrays.of(staged, numbers, self.cost))
        self._observed += 1
        self._columns, self._arrays, self._table = None, {}, None

    def check_unit(self, unit: Unit) -> None:
        """Raise `DemandError` if a unit of this name was of another kind before."""
        check_kind(unit, self._kinds)

    @property
    def learns(self) -> bool:
        """Whether it can `observe`; one of given probabilities (`from_units`) cannot."""
        return self._given is None

    @property
    def observed(self) -> int:
        """Runs ever observed, those that are forgotten included."""
        return self._observed

    @property
    def known(self) -> frozenset[str]:
        """Names of the units of the remembered runs, or of those given."""
        if self._given is not None:
            return frozenset(given.unit.name for given in self._given[0])
        return frozenset(self._executed)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units of the remembered runs, in order of first appearance; or those given."""
        if self._given is not None:
            return tuple(given.unit for given in self._given[0])
        return self.columns().units if self._runs else ()

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs remembered, oldest first; none for a graph of given probabilities."""
        return tuple(self._runs)

    def samples(self, unit: str) -> tuple[Execution, ...]:
        """The executions of `unit` that are remembered, oldest first, or given.

        Raises:
            DemandError: an unknown unit.
        """
        self.walk_arrays().node(unit)
        if self._given is not None:
            return tuple(e for g in self._given[0] if g.unit.name == unit for e in g.executions)
        return tuple(e for run in self._stages for e in run if e.unit.name == unit)

    def members(self, unit: Unit) -> tuple[Unit, ...]:
        """The units that go side by side in a stage that the graph has; of a unit, itself."""
        return self._members.get(unit.name, (unit,))

    def branches(self, unit: str) -> Mapping[str, float]:
        """How often each unit, or "end", follows `unit` ("start" for the first); of sum 1.

        Raises:
            DemandError: an unknown unit, or a graph without runs.
        """
        arrays = self.walk_arrays()
        return arrays.branches(arrays.node(unit))

    def columns(self) -> RunColumns:
        """The remembered runs as arrays, for refinements and tests of drift.

        Raises:
            DemandError: a graph without runs.
        """
        if not self._runs:
            raise DemandError(
                f"graph {self.name!r} has seen no run; fit it or observe one first"
                if self._given is None
                else f"graph {self.name!r} was given its probabilities and remembers no runs; "
                "fit one to `draw_runs` of it"
            )
        if self._columns is None:
            self._columns = RunColumns.of(self._run_arrays, tuple(self._kinds.values()))
        return self._columns

    def run_weights(self) -> Floats:
        """`[runs]` weight of each remembered run: 2^(-age / half-life), age in runs, never 0.

        Raises:
            DemandError: a graph without runs.
        """
        ages = self.columns().ages
        if self.half_life_runs is None:
            return np.ones(ages.size)
        return decayed(ages, self.half_life_runs)

    @renamed_keyword("demand", "parallel_calls")
    def walk_arrays(self, parallel_calls: ParallelCalls = "sum") -> WalkArrays:
        """The samples as arrays, from which random walks draw.

        Raises:
            DemandError: a graph without runs, or from which the end cannot be reached.
        """
        check_parallel_calls(parallel_calls)
        if parallel_calls not in self._arrays:
            if self._given is not None:
                arrays = given_arrays(*self._given, self.cost, parallel_calls)
            else:
                arrays = WalkArrays.of_runs(self.columns(), parallel_calls, self.half_life_runs)
            stuck = arrays.without_end()
            if stuck:
                raise DemandError(
                    f"from {', '.join(stuck)} of graph {self.name!r} the end cannot be reached; "
                    "every loop needs a way out"
                )
            self._arrays[parallel_calls] = arrays
        return self._arrays[parallel_calls]

    @renamed_keyword("demand", "parallel_calls")
    def remaining(
        self,
        progress: Progress | None = None,
        *,
        parallel_calls: ParallelCalls = "sum",
        walks: int = 1000,
        seed: int = 0,
        max_units: int = MAX_UNITS,
    ) -> Distribution:
        """Distribution of the seconds an application still needs, by Monte Carlo.

        The walks ahead of the present unit are drawn once and serve the next questions, too;
        `WalkTable` says why an answer is as good as one by walks of its own.

        Args:
            progress: where it stands; `None` is before its first unit. The sample of the current
                unit is conditioned on exceeding what was received; when no sample does, the rest
                of that unit follows the doubling rule of `beyond_samples`. Between
                two units the walk starts with the branch after the last one.
            parallel_calls: "sum" counts all calls of a unit, which is what is to be served;
                "critical_path" the longest alone, which is what a deadline sees at best.
            walks: number of random walks (1000 in the paper).
            seed: of the walks; the same seed gives the same distribution.
            max_units: executions after which a walk is given up.

        Raises:
            DemandError: a graph without runs, a unit the graph does not know, or a walk longer
                than `max_units`.
        """
        progress = Progress() if progress is None else instance_of("progress", progress, Progress)
        walks = whole_number("walks", walks, least=1)
        seed = whole_number("seed", seed, least=0)
        most = whole_number("max_units", max_units, least=0)
        arrays = self.walk_arrays(parallel_calls)
        first = arrays.first_draws(progress, parallel_calls)
        if self._table is None or not self._table.answers(arrays, walks, seed, most):
            self._table = WalkTable(arrays, walks, seed, most)
        return Distribution(self._table.totals(first))

    def draw_runs(self, n: int, seed: int = 0, max_units: int = MAX_UNITS) -> list[list[Execution]]:
        """Draw `n` runs by random walks over the samples, for workloads and tests.

        They are sequences, and a stage of several units is one execution with all their calls;
        but where other units go beside calls to a model, one execution would be no call: they are
        drawn as they were, side by side, and wait for all of the stage before.

        Raises:
            DemandError: a graph without runs, or a run longer than `max_units`.
        """
        arrays = self.walk_arrays()
        executions = [self._drawn_as(unit) for unit in self.units]
        rng = np.random.default_rng(whole_number("seed", seed, least=0))
        n, max_units = whole_number("n", n, least=0), whole_number("max_units", max_units, least=0)
        return [
            in_line(
                [executions[node - 2][drawn % len(executions[node - 2])] for node, drawn in path]
            )
            for path in (arrays.path(rng, max_units) for _ in range(n))
        ]

    def _drawn_as(self, unit: Unit) -> list[Sequence[Execution]]:
        """What each sample of `unit` is in a drawn run: itself, or the units of a mixed stage."""
        kinds = {one.kind for one in self.members(unit)}
        if len(kinds) == 1 or "llm" not in kinds:
            return [(execution,) for execution in self.samples(unit.name)]
        return [
            units
            for run, stages in zip(self._runs, self._stages, strict=True)
            if any(stage.unit == unit for stage in stages)
            for stage, units in zip(stages, by_stage(run), strict=True)
            if stage.unit == unit
        ]

    def to_networkx(self) -> "DiGraph":
        """The graph for networkx; see `demand.graph.networkx_export.to_networkx`."""
        from demand.graph.networkx_export import to_networkx

        return to_networkx(self)

    def figure(self, ax: "Axes | None" = None) -> "Axes":
        """A picture of the graph with matplotlib; see `demand.graph.drawing.draw_graph`."""
        from demand.graph.drawing import draw_graph

        return draw_graph(self, ax)

    def draw(self, ax: "Axes | None" = None) -> "Axes":
        """The old name of `figure`: what is drawn from a graph elsewhere are runs (`draw_runs`)."""
        warn_renamed_method("PDGraph", "draw", "figure")
        return self.figure(ax)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph to `path` as JSON; a reader sees the old file or the new, never half.

        Raises:
            DemandError: a path that is a folder, or in a folder that is missing.
        """
        write_graph(path, self.record())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PDGraph":
        """Read what `save` wrote.

        Raises:
            DemandError: not such a file, another format version, or a broken entry.
            FileNotFoundError: no file at `path`.
        """
        return cls.of_record(read_graph(path))

    def record(self) -> GraphRecord:
        """All that is saved of the graph."""
        settings = (self.name, self.window, self.cost, self.half_life_runs)
        return GraphRecord(*settings, self.runs, *(self._given or ((), {})))

    @classmethod
    def of_record(cls, record: GraphRecord) -> "PDGraph":
        """The graph of which `record` was taken."""
        if record.given:
            return cls.from_units(record.given, record.entries, name=record.name, cost=record.cost)
        graph = cls(record.name, record.window, record.cost, record.half_life_runs)
        for run in record.runs:
            graph.observe(run)
        return graph

    def _repr_svg_(self) -> str | None:
        # Of an empty graph, and of one that takes long to draw, a notebook shows the text.
        known = self._given is not None or bool(self._runs)
        quick = len(self.units) <= SHOWN_UNITS and len(self._runs) <= SHOWN_RUNS
        return svg(self.figure) if known and quick else None

    def __repr__(self) -> str:
        known = "given" if self._given is not None else f"{len(self._runs)} runs"
        return f"PDGraph({self.name!r}, {len(self.units)} units, {known})"
