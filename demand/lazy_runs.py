"""Many runs at little memory: made when they are asked for, from columns or from fewer runs."""

import operator
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final, overload

import numpy as np
from numpy.typing import NDArray

from demand.seconds import Floats
from demand.units import CostModel, Execution, Unit

Ints = NDArray[np.integer[Any]]
Run = Sequence[Execution]


class LazyRuns(Sequence[Run]):
    """Runs by position. Asking twice for one makes its executions twice, equal and not the same.

    They are equal to any sequence of equal runs.
    """

    @abstractmethod
    def run(self, at: int) -> Run:
        """The run at position `at`, from 0 up to the number of runs."""

    @abstractmethod
    def seconds(self, cost: CostModel) -> Floats:
        """`[runs]` what `cost.run_seconds` says of each, to the bit."""

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

    def __len__(self) -> int:
        return self.starts.size - 1

    def __repr__(self) -> str:
        return f"ColumnRuns({len(self)} runs of {self.unit.size} executions)"

    def run(self, at: int) -> Run:
        """The run at position `at`, from 0 up to the number of runs."""
        of = slice(self.starts[at], self.starts[at + 1])
        columns = (
            *(self.unit, self.input_tokens, self.output_tokens),
            *(self.parallelism, self.unit_seconds),
        )
        return [
            Execution(
                self.units[unit], read, written, calls, None if seconds != seconds else seconds
            )
            for unit, read, written, calls, seconds in zip(
                *(column[of].tolist() for column in columns), strict=True
            )
        ]

    def seconds(self, cost: CostModel) -> Floats:
        """`[runs]` what `cost.run_seconds` says of each, to the bit."""
        by_tokens = (
            self.input_tokens * cost.prefill_seconds_per_token
            + self.output_tokens * cost.decode_seconds_per_token
        )
        call = np.where(np.isnan(self.unit_seconds), by_tokens, self.unit_seconds)
        run = np.repeat(np.arange(len(self)), np.diff(self.starts))
        seconds = np.bincount(run, self.parallelism * call, minlength=len(self))
        return seconds.astype(np.float64, copy=False)


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
