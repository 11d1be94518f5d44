"""What a run has shown at each boundary between its units, as features for statistics."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from demand.arguments import instance_of
from demand.errors import DemandError
from demand.graph.run_columns import Ints, RunColumns
from demand.seconds import Floats
from demand.units import CostModel, ParallelCalls, Progress

RECENT = 4
"""Executions that count as recent."""


@dataclass(frozen=True, eq=False)
class Boundaries:
    """Every boundary at which a remembered run was not yet over.

    Attributes:
        features: `[n, d]`, see `ProgressFeatures`.
        remaining: `[n]` seconds from there to the end of the run.
        run: `[n]` number of the run.
    """

    features: Floats
    remaining: Floats
    run: Ints


@dataclass(frozen=True)
class ProgressFeatures:
    """Turns how far a run has come into features, alike for learning and for prediction.

    Units finished, seconds so far, seconds of the last unit, mean seconds of the recent ones and
    tokens of the last one, each as log(1 + x); how often each unit ran, likewise; and which unit
    was the last.

    Args:
        units: position of each unit, by name.
        cost: seconds of an execution.
        parallel_calls: how parallel calls count.
    """

    units: Mapping[str, int]
    cost: CostModel
    parallel_calls: ParallelCalls

    @classmethod
    def of_graph(
        cls, columns: RunColumns, cost: CostModel, parallel_calls: ParallelCalls
    ) -> "ProgressFeatures":
        """Those of the units of a graph, by its columns."""
        units = {unit.name: number for number, unit in enumerate(columns.units)}
        return cls(units, cost, parallel_calls)

    def of_columns(self, columns: RunColumns) -> Boundaries:
        """Features and what remained, at every boundary of every run but its end."""
        seconds, run = columns.execution_seconds(self.parallel_calls), columns.run
        so_far, remaining = np.zeros(seconds.size), np.empty(seconds.size)
        for start, end in pairwise(columns.starts.tolist()):  # sums that round as those of one run
            own = seconds[start:end]
            np.cumsum(own[:-1], out=so_far[start + 1 : end])
            np.cumsum(own[::-1], out=remaining[start:end][::-1])
        at = np.arange(seconds.size)
        finished = at - columns.starts[run]
        recent = np.minimum(finished, RECENT)
        last = at[finished > 0] - 1
        numbers = np.zeros((seconds.size, 6))
        numbers[:, 0] = finished
        numbers[:, 1] = so_far
        numbers[last + 1, 2] = seconds[last]
        numbers[:, 3] = (so_far - so_far[at - recent]) / np.maximum(recent, 1)
        numbers[last + 1, 4:] = columns.attributes[last, :2]
        before = np.zeros((seconds.size, len(self.units)))
        before[last + 1, columns.unit[last]] = 1.0
        ran = np.cumsum(before, axis=0)  # over all runs: whole numbers, so that nothing is rounded
        ran -= ran[columns.starts[:-1]][run]
        return Boundaries(np.hstack([np.log1p(numbers), np.log1p(ran), before]), remaining, run)

    def of_progress(self, progress: Progress) -> Floats:
        """`[d]` features of the boundary after the last finished unit.

        Raises:
            DemandError: an unknown unit.
        """
        executed = instance_of("progress", progress, Progress).executed
        tokens = np.array([(e.input_tokens, e.output_tokens) for e in executed]).reshape(-1, 2)
        seconds = np.array([self.cost.seconds(e, self.parallel_calls) for e in executed])
        unit = np.array([self.number(e.unit.name) for e in executed], dtype=np.int64)
        return self._table(unit, seconds, tokens)[-1]

    def _table(self, unit: Ints, seconds: Floats, tokens: Floats) -> Floats:
        """`[n + 1, d]` features at each boundary of a run of `n` executions."""
        n = unit.size
        ran = np.zeros((n + 1, len(self.units)))
        ran[np.arange(1, n + 1), unit] = 1.0
        so_far = np.append(0.0, np.cumsum(seconds))
        finished = np.arange(n + 1)
        recent = np.minimum(finished, RECENT)
        numbers = np.zeros((n + 1, 6))
        numbers[:, 0] = finished
        numbers[:, 1] = so_far
        numbers[1:, 2] = seconds
        numbers[:, 3] = (so_far - so_far[finished - recent]) / np.maximum(recent, 1)
        numbers[1:, 4:] = tokens
        return np.hstack([np.log1p(numbers), np.log1p(np.cumsum(ran, axis=0)), ran])

    def number(self, unit: str) -> int:
        """Position of a unit.

        Raises:
            DemandError: an unknown unit.
        """
        if unit not in self.units:
            raise DemandError(
                f"unit {unit!r} is not in the graph, which has {', '.join(self.units)}; "
                "observe a run that has it first"
            )
        return self.units[unit]
