"""The runs that a graph remembers, as arrays: what walks, refinements and drift tests read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class RunArrays(NamedTuple):
    """One run as arrays, made when it is observed.

    Attributes:
        unit: `[n]` number of the unit of each execution, as its graph counts them.
        attributes: `[n, 4]`, by `ATTRIBUTES`.
        seconds: `[n]` of each execution, for "sum" and for "critical_path".
    """

    unit: Ints
    attributes: Floats
    seconds: Mapping[ParallelCalls, Floats]

    @classmethod
    def of(
        cls, run: Sequence[Execution], numbers: Mapping[str, int], cost: CostModel
    ) -> "RunArrays":
        """The arrays of a run of at least one execution, its units numbered by name."""
        seconds: dict[ParallelCalls, Floats] = {
            parallel_calls: np.array([cost.seconds(execution, parallel_calls) for execution in run])
            for parallel_calls in PARALLEL_CALLS
        }
        tokens = [(e.input_tokens, e.output_tokens, e.parallelism) for e in run]
        return cls(
            np.array([numbers[execution.unit.name] for execution in run], dtype=np.int64),
            np.column_stack([np.array(tokens, dtype=np.float64), seconds["sum"]]),
            seconds,
        )


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
    def of(cls, runs: Iterable[RunArrays], numbered: Sequence[Unit]) -> "RunColumns":
        """The arrays of at least one run end to end.

        Args:
            runs: oldest first.
            numbered: the units by the numbers that `runs` give them, and maybe others.
        """
        runs = list(runs)
        unit = np.concatenate([run.unit for run in runs])
        numbers, first = np.unique(unit, return_index=True)
        numbers = numbers[np.argsort(first)]
        position = np.zeros(len(numbered), dtype=np.int64)
        position[numbers] = np.arange(numbers.size)
        return cls(
            tuple(numbered[number] for number in numbers),
            position[unit],
            np.cumsum([0, *(run.unit.size for run in runs)]),
            np.concatenate([run.attributes for run in runs]),
            {
                parallel_calls: np.concatenate([run.seconds[parallel_calls] for run in runs])
                for parallel_calls in PARALLEL_CALLS
            },
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
