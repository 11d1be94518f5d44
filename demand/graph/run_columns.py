"""The runs that a graph remembers, as arrays: what walks, refinements and drift tests read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from demand.seconds import Floats
from demand.units import (
    PARALLEL_CALLS,
    CostModel,
    Execution,
    ParallelCalls,
    Unit,
    check_parallel_calls,
)

Ints = NDArray[np.int64]

ATTRIBUTES = ("input_tokens", "output_tokens", "parallelism", "seconds")
"""Attributes of an execution that correlations are taken between; seconds are the sum over its
calls as the cost model counts them."""


def decayed(ages: Ints, half_life_runs: float) -> Floats:
    """Weights 2^(-age / half-life), ages in runs; never 0, so that old runs can still be drawn."""
    return np.exp2(-np.minimum(ages / half_life_runs, 1000.0))


@dataclass(frozen=True, eq=False)
class RunColumns:
    """Executions of all remembered runs end to end, oldest run first.

    Attributes:
        units: in order of first appearance.
        unit: `[n]` position in `units` of each execution.
        starts: `[runs + 1]`; run r is the executions `starts[r]` up to `starts[r + 1]`.
        attributes: `[n, 4]`, by `ATTRIBUTES`.
        seconds: `[n]` of each execution, for "sum" and for "critical_path".
    """

    units: tuple[Unit, ...]
    unit: Ints
    starts: Ints
    attributes: Floats
    seconds: Mapping[ParallelCalls, Floats]

    @classmethod
    def of(cls, runs: Sequence[Sequence[Execution]], cost: CostModel) -> "RunColumns":
        """The columns of `runs`, each of at least one execution."""
        flat = [execution for run in runs for execution in run]
        units = dict.fromkeys(execution.unit for execution in flat)
        number = {unit: position for position, unit in enumerate(units)}
        seconds: dict[ParallelCalls, Floats] = {
            parallel_calls: np.array(
                [cost.seconds(execution, parallel_calls) for execution in flat]
            )
            for parallel_calls in PARALLEL_CALLS
        }
        tokens = [(e.input_tokens, e.output_tokens, e.parallelism) for e in flat]
        return cls(
            tuple(units),
            np.array([number[execution.unit] for execution in flat], dtype=np.int64),
            np.cumsum([0, *map(len, runs)]),
            np.column_stack([np.array(tokens, dtype=np.float64), seconds["sum"]]),
            seconds,
        )

    @property
    def run(self) -> Ints:
        """`[n]` number of the run of each execution."""
        return np.repeat(np.arange(self.starts.size - 1), np.diff(self.starts))

    @property
    def ages(self) -> Ints:
        """`[runs]` how many runs ago each was observed; 0 is the newest."""
        return np.arange(self.starts.size - 1)[::-1]

    def execution_seconds(self, parallel_calls: ParallelCalls = "sum") -> Floats:
        """`[n]` seconds of each execution.

        Raises:
            DemandError: an unknown way to count parallel calls.
        """
        check_parallel_calls(parallel_calls)
        return self.seconds[parallel_calls]

    def run_seconds(self, parallel_calls: ParallelCalls = "sum") -> Floats:
        """`[runs]` total seconds of each run."""
        return np.add.reduceat(self.execution_seconds(parallel_calls), self.starts[:-1])

    def unit_seconds(self, parallel_calls: ParallelCalls = "sum") -> Floats:
        """`[runs, units]` seconds of each run in each unit, over all its executions."""
        table = np.zeros((self.starts.size - 1, len(self.units)))
        np.add.at(table, (self.run, self.unit), self.execution_seconds(parallel_calls))
        return table
