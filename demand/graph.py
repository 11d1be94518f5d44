"""The probabilistic demand graph of an application, learned from its runs."""

import os
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import final

import numpy as np

from demand.distribution import Distribution
from demand.errors import DemandError
from demand.graph_json import GraphRecord, read_graph, write_graph
from demand.units import END, START, CostModel, Execution, Progress, Unit
from demand.walks import WalkArrays

Followed = tuple[Execution, str]
"""An execution, and the name of the unit that followed it (or "end")."""


@final
class PDGraph:
    """Probabilistic demand graph (Hermes, arXiv 2506.14851).

    A node is a unit with the samples of its executions; an edge is weighted by how often one unit
    followed another; loops are edges that lead back. The remaining demand of an application is
    found by random walks from where it stands to the end.

    Departures from the paper's artifact: a sample keeps tokens, parallelism, seconds and successor
    together, where the artifact draws each on its own; walks have no silent cap of 50 units; the
    correlation of one unit with the next is not used (each walk step depends on the current unit
    alone).

    Build one with `PDGraph.fit`; keep it current with `observe`.

    Args:
        name: of the application, for messages and for people.
        window: samples kept per unit; the oldest leave first (1000 as in the SC25 artifact). A
            unit that loops 17 times a run then remembers 60 runs; raise it where loops matter.
        cost: seconds of an execution.
    """

    def __init__(
        self, name: str = "application", window: int = 1000, cost: CostModel | None = None
    ) -> None:
        if window < 1:
            raise DemandError(f"window is {window}; a graph keeps at least one sample per unit")
        self.name = name
        self.window = window
        self.cost = CostModel() if cost is None else cost
        self._units: dict[str, Unit] = {}
        self._entries: deque[str] = deque(maxlen=window)
        self._samples: dict[str, deque[Followed]] = {}
        self._arrays: WalkArrays | None = None  # laid out at the first walk after a change

    @classmethod
    def fit(
        cls,
        runs: Iterable[Sequence[Execution]],
        *,
        name: str = "application",
        window: int = 1000,
        cost: CostModel | None = None,
    ) -> "PDGraph":
        """Learn a graph from finished runs of one application, oldest first.

        Raises:
            DemandError: no runs, an empty run, or a unit name with two kinds.
        """
        graph = cls(name, window, cost)
        for run in runs:
            graph.observe(run)
        if not graph._units:
            raise DemandError("there are no runs to fit a graph to; pass at least one finished run")
        return graph

    def observe(self, run: Sequence[Execution]) -> None:
        """Learn from one finished run; where a window is full its oldest sample is forgotten.

        Raises:
            DemandError: an empty run, or a unit name with two kinds. The graph is then unchanged.
        """
        if not run:
            raise DemandError("the run is empty; pass the units it executed, in order")
        units = dict(self._units)
        for execution in run:
            unit = execution.unit
            if units.setdefault(unit.name, unit) != unit:
                raise DemandError(
                    f"unit {unit.name!r} is of kind {unit.kind!r} here and of kind "
                    f"{units[unit.name].kind!r} before; give the two different names"
                )
        self._units = units
        self._arrays = None
        self._entries.append(run[0].unit.name)
        successors = [*(execution.unit.name for execution in run[1:]), END]
        for execution, successor in zip(run, successors, strict=True):
            samples = self._samples.setdefault(execution.unit.name, deque(maxlen=self.window))
            samples.append((execution, successor))

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units seen, in order of first appearance."""
        return tuple(self._units.values())

    def samples(self, unit: str) -> tuple[Execution, ...]:
        """The executions of `unit` that are remembered, oldest first."""
        return tuple(execution for execution, _ in self._samples_of(unit))

    def branches(self, unit: str) -> Mapping[str, float]:
        """How often each unit, or "end", followed `unit` ("start" for the first); of sum 1."""
        if unit == START:
            counts = Counter(self._entries)
        else:
            counts = Counter(successor for _, successor in self._samples_of(unit))
        return {name: count / counts.total() for name, count in counts.items()}

    def remaining(
        self,
        progress: Progress | None = None,
        *,
        walks: int = 1000,
        seed: int = 0,
        max_units: int = 10_000,
    ) -> Distribution:
        """Distribution of the seconds an application still needs, by Monte Carlo.

        Args:
            progress: where it stands; `None` is before its first unit. The sample of the current
                unit is conditioned on exceeding what was attained; when no sample does, the rest
                of that unit follows the doubling rule of `demand.atoms.beyond_samples`. Between
                two units the walk starts with the branch after the last one.
            walks: number of random walks (1000 in the paper).
            seed: of the walks; the same seed gives the same distribution.
            max_units: executions after which a walk is given up.

        Raises:
            DemandError: a graph without runs, a unit the graph has not seen, or a walk longer
                than `max_units`.
        """
        if walks < 1:
            raise DemandError(f"walks is {walks}; at least one random walk is needed")
        progress = Progress() if progress is None else progress
        for execution in progress.executed:
            self._samples_of(execution.unit.name)
        arrays = self._laid_out()
        if progress.current is not None:
            self._samples_of(progress.current)
            first = arrays.unfinished(arrays.nodes[progress.current], progress.attained_seconds)
        else:
            last = progress.executed[-1].unit.name if progress.executed else START
            first = arrays.finished(arrays.nodes[last])
        rng = np.random.default_rng(seed)
        return Distribution(arrays.walk(first, rng, walks, max_units))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph to `path` as JSON; a reader sees the old file or the new, never half."""
        write_graph(
            path,
            GraphRecord(
                self.name,
                self.window,
                self.cost,
                self.units,
                tuple(self._entries),
                {name: tuple(samples) for name, samples in self._samples.items()},
            ),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PDGraph":
        """Read what `save` wrote.

        Raises:
            DemandError: not such a file, another format version, a broken entry, a successor
                that is no unit, or a unit from which the end cannot be reached.
            FileNotFoundError: no file at `path`.
        """
        record = read_graph(path)
        graph = cls(record.name, record.window, record.cost)
        graph._units = {unit.name: unit for unit in record.units}
        graph._entries.extend(record.entries)
        graph._samples = {
            name: deque(samples, maxlen=record.window) for name, samples in record.samples.items()
        }
        graph._laid_out()
        return graph

    def __repr__(self) -> str:
        count = sum(map(len, self._samples.values()))
        return f"PDGraph({self.name!r}, {len(self._units)} units, {count} samples)"

    def _samples_of(self, unit: str) -> deque[Followed]:
        if unit not in self._units:
            raise DemandError(
                f"unit {unit!r} is not in graph {self.name!r}, which has "
                f"{', '.join(self._units) or 'no units'}; observe a run that has it first"
            )
        return self._samples[unit]

    def _laid_out(self) -> WalkArrays:
        if self._arrays is None:
            if not self._units:
                raise DemandError(
                    f"graph {self.name!r} has seen no run; fit it or observe one first"
                )
            samples = {
                name: [(self.cost.seconds(execution), after) for execution, after in followed]
                for name, followed in self._samples.items()
            }
            entries = [(0.0, entry) for entry in self._entries]
            arrays = WalkArrays.of({START: entries, **samples}, START, END)
            stuck = arrays.without_exit()
            if stuck:
                raise DemandError(
                    f"from {', '.join(stuck)} of graph {self.name!r} the end cannot be reached; "
                    "every loop needs a way out: add finished runs that leave it"
                )
            self._arrays = arrays
        return self._arrays
