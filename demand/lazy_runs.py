"""Many runs at little memory: made when they are asked for, from columns or from fewer runs."""

import operator
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final, overload

import numpy as np
from numpy.typing import NDArray

from demand.seconds import Floats
from demand.units import CostModel, Execution, Unit, check_run

Ints = NDArray[np.integer[Any]]
Run = Sequence[Execution]
KEPT = 4096
"""Runs of columns that stay made, the first ones asked for: short workloads are often served again.
"""


class LazyRuns(Sequence[Run]):
    """Runs by position; one that is asked for twice may be made twice, equal and not the same.

    They are equal to any sequence of equal runs.
    """

    @abstractmethod
    def run(self, at: int) -> Run:
        """The run at position `at`, from 0 up to the number of runs."""

    @abstractmethod
    def seconds(self, cost: CostModel) -> Floats:
        """`[runs]` what `cost.run_seconds` says of each, to the bit."""

    @abstractmethod
    def execution_seconds(self, at: int, cost: CostModel) -> list[float]:
        """What `cost.seconds` says of each execution of the run at `at`, to the bit."""

    @overload
    def __getitem__(self, at: int) -> Run: ...
    @overload
    def __getitem__(self, at: slice) -> list[Run]: ...
    def __getitem__(self, at: int | slice) -> Run | list[Run]:
        if isinstance(at, slice):
            return [self.run(one) for one in range(*at.indices(len(self)))]
        one, n = operator.index(at), len(self)
        if not -n <= one < n:
            raise IndexError(f"run {one} of {n} runs")
        return self.run(one % n)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        pairs = zip(self, other, strict=False)
        return len(self) == len(other) and all(list(a) == list(b) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]


@final
@dataclass(frozen=True, eq=False, repr=False)
class ColumnRuns(LazyRuns):
    """Runs as arrays over their executions, end to end.

    Args:
        units: what was executed.
        unit: `[n]` position in `units` of each execution.
        starts: `[runs + 1]`; run r is the executions `starts[r]` up to `starts[r + 1]`.
        input_tokens: `[n]` prompt tokens per call.
        output_tokens: `[n]` generated tokens per call.
        parallelism: `[n]` calls.
        unit_seconds: `[n]` seconds per call, NaN where tokens are costed.
    """

    units: tuple[Unit, ...]
    unit: Ints
    starts: Ints
    input_tokens: Floats
    output_tokens: Floats
    parallelism: Ints
    unit_seconds: Floats
    _made: dict[int, Run] = field(default_factory=dict, init=False)
    _costed: dict[CostModel, Floats] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return self.starts.size - 1

    def __repr__(self) -> str:
        return f"ColumnRuns({len(self)} runs of {self.unit.size} executions)"

    def run(self, at: int) -> Run:
        """The run at position `at`, from 0 up to the number of runs."""
        made = self._made.get(at)
        if made is not None:
            return made
        of = slice(self.starts[at], self.starts[at + 1])
        columns = (
            *(self.unit, self.input_tokens, self.output_tokens),
            *(self.parallelism, self.unit_seconds),
        )
        made = [
            Execution(
                self.units[unit], read, written, calls, None if seconds != seconds else seconds
            )
            for unit, read, written, calls, seconds in zip(
                *(column[of].tolist() for column in columns), strict=True
            )
        ]
        if len(self._made) < KEPT:
            self._made[at] = made
        return made

    def execution_seconds(self, at: int, cost: CostModel) -> list[float]:
        """What `cost.seconds` says of each execution of the run at `at`, to the bit."""
        costed = self._costed.get(cost)
        if costed is None:
            self._costed.clear()  # whoever asks run by run asks by one cost model
            costed = self._costed[cost] = self._seconds(cost)
        seconds: list[float] = costed[self.starts[at] : self.starts[at + 1]].tolist()
        return seconds

    def seconds(self, cost: CostModel) -> Floats:
        """`[runs]` what `cost.run_seconds` says of each, to the bit."""
        run = np.repeat(np.arange(len(self)), np.diff(self.starts))
        seconds = np.bincount(run, self._seconds(cost), minlength=len(self))
        return seconds.astype(np.float64, copy=False)

    def _seconds(self, cost: CostModel) -> Floats:
        """`[n]` of each execution."""
        by_tokens = (
            self.input_tokens * cost.prefill_seconds_per_token
            + self.output_tokens * cost.decode_seconds_per_token
        )
        call = np.where(np.isnan(self.unit_seconds), by_tokens, self.unit_seconds)
        return call * self.parallelism


@final
@dataclass(frozen=True, eq=False, repr=False)
class PickedRuns(LazyRuns):
    """Some of other runs, any of them as often as it is picked.

    Args:
        pool: runs.
        picks: `[runs]` positions in `pool`.
    """

    pool: Sequence[Run]
    picks: Ints

    def __len__(self) -> int:
        return self.picks.size

    def __repr__(self) -> str:
        return f"PickedRuns({len(self)} of {len(self.pool)} runs)"

    def run(self, at: int) -> Run:
        """The run at position `at`, from 0 up to the number of runs."""
        return self.pool[int(self.picks[at])]

    def execution_seconds(self, at: int, cost: CostModel) -> list[float]:
        """What `cost.seconds` says of each execution of the run at `at`, to the bit."""
        return execution_seconds(self.pool, int(self.picks[at]), cost)

    def seconds(self, cost: CostModel) -> Floats:
        """`[runs]` what `cost.run_seconds` says of each, to the bit."""
        return runs_seconds(self.pool, cost)[self.picks]


@final
@dataclass(frozen=True, eq=False, repr=False)
class MixedRuns(LazyRuns):
    """Runs of several sources in the order of the jobs that have them.

    Args:
        sources: runs of each.
        source: `[runs]` which of `sources` each is from; each source is used up in its order.
    """

    sources: Sequence[Sequence[Run]]
    source: Ints
    _at: Ints

    @classmethod
    def of(cls, sources: Sequence[Sequence[Run]], source: Ints) -> "MixedRuns":
        """The next run of source `source[i]` for each job i."""
        at = np.empty(source.size, np.int32)
        for number, runs in enumerate(sources):
            mine = np.flatnonzero(source == number)
            at[mine] = np.arange(len(runs))
        return cls(sources, source, at)

    def __len__(self) -> int:
        return self.source.size

    def __repr__(self) -> str:
        return f"MixedRuns({len(self)} runs of {len(self.sources)} sources)"

    def run(self, at: int) -> Run:
        """The run at position `at`, from 0 up to the number of runs."""
        return self.sources[int(self.source[at])][int(self._at[at])]

    def execution_seconds(self, at: int, cost: CostModel) -> list[float]:
        """What `cost.seconds` says of each execution of the run at `at`, to the bit."""
        return execution_seconds(self.sources[int(self.source[at])], int(self._at[at]), cost)

    def seconds(self, cost: CostModel) -> Floats:
        """`[runs]` what `cost.run_seconds` says of each, to the bit."""
        seconds = np.empty(len(self))
        for number, runs in enumerate(self.sources):
            seconds[self.source == number] = runs_seconds(runs, cost)
        return seconds


def runs_seconds(runs: Sequence[Run], cost: CostModel) -> Floats:
    """`[runs]` total seconds of each run, without making the executions of lazy ones."""
    if isinstance(runs, LazyRuns):
        return runs.seconds(cost)
    return np.array([cost.run_seconds(run) for run in runs], np.float64)


def execution_seconds(runs: Sequence[Run], at: int, cost: CostModel) -> list[float]:
    """Seconds of each execution of the run at `at`, without making those of lazy ones.

    Raises:
        DemandError: a run that is no list of executions.
    """
    if isinstance(runs, LazyRuns):
        return runs.execution_seconds(at, cost)
    return [cost.seconds(execution) for execution in check_run(f"the run of job {at}", runs[at])]
