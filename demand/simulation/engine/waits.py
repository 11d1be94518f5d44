"""What of a run with units side by side is over, is underway, and waits for what."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import final

from demand.dependencies import parents
from demand.errors import DemandError
from demand.simulation.engine.engine import Engine
from demand.stages import Underway, progress_at_end
from demand.units import CostModel, Execution, Progress, is_sequence


@final
class Waits:
    """Where a run stands whose units begin as soon as those they wait for are over.

    Args:
        run: what is executed, some of it side by side.

    Attributes:
        underway: positions of the units that have begun and are not over, in that order.
        ended: positions of those that are over, in the order in which they ended.
    """

    def __init__(self, run: Sequence[Execution]) -> None:
        self.underway: list[int] = []
        self.ended: list[int] = []
        self._run = run
        self._waits = parents([execution.after for execution in run])
        self._left = [len(before) for before in self._waits]
        self._followers: list[list[int]] = [[] for _ in run]
        for at, before in enumerate(self._waits):
            for one in before:
                self._followers[one].append(at)

    @property
    def over(self) -> bool:
        """Whether all units are."""
        return len(self.ended) == len(self._run)

    def first(self) -> list[int]:
        """The units that wait for none."""
        return [at for at, left in enumerate(self._left) if not left]

    def begin(self, position: int) -> None:
        """A unit begins."""
        self.underway.append(position)

    def end(self, position: int) -> list[int]:
        """A unit is over: those that may begin with that, in their order."""
        self.underway.remove(position)
        self.ended.append(position)
        for follower in self._followers[position]:
            self._left[follower] -= 1
        return [follower for follower in self._followers[position] if not self._left[follower]]

    def progress(
        self,
        ready: Sequence[int],
        received: Callable[[int], tuple[float, float]],
        cost: CostModel,
    ) -> Progress:
        """How far the run has come at the end of a unit, told as by `progress_after`.

        Args:
            ready: units that may begin with that end, and have not yet.
            received: seconds of service that a unit underway has attained, and its longest call.
            cost: seconds of what is over.
        """
        after = self._after(self.ended)
        return progress_at_end(
            [replace(self._run[position], after=after(position)) for position in self.ended],
            [
                Underway(self._run[position].unit, after(position), *received(position))
                for position in self.underway
            ]
            + [Underway(self._run[position].unit, after(position)) for position in ready],
            cost,
        )

    def as_ended(self) -> list[Execution]:
        """The run with the units that are over before the others, in the order they ended in."""
        ended = set(self.ended)
        order = self.ended + [at for at in range(len(self._run)) if at not in ended]
        after = self._after(order)
        return [replace(self._run[position], after=after(position)) for position in order]

    def _after(self, order: Sequence[int]) -> Callable[[int], tuple[int, ...]]:
        """From a position in the run to those, in `order`, of what it waits for."""
        at = {position: number for number, position in enumerate(order)}
        return lambda position: tuple(at[before] for before in self._waits[position])


def check_side_by_side(
    index: int, run: Sequence[Execution], engine: Engine, with_backends: bool
) -> None:
    """Raise `DemandError` if `run` has units side by side that the engine cannot tell apart.

    Backends know of one unit of a job at a time. What a call leaves, under a retention, is found
    by the name of its unit.
    """
    if is_sequence(run):
        return
    if with_backends:
        raise DemandError(
            f"the run of job {index} has units side by side (after=...), and backends know of one "
            "unit of a job at a time; give no backends, or the run with after=None"
        )
    twice = None if engine.retention is None else _name_twice(run)
    if twice is not None:
        raise DemandError(
            f"the run of job {index} has two units {twice!r} side by side, and what a call leaves "
            "is found by the name of its unit; name them differently, make them parallel calls of "
            "one unit, or give Engine(retention=None)"
        )


def _name_twice(run: Sequence[Execution]) -> str | None:
    """A name that two llm units have neither of which waits for the other; `None` if none is."""
    reach: list[set[int]] = []  # of each unit, all that it waits for, and what these do
    for at, before in enumerate(parents([execution.after for execution in run])):
        reach.append({*before}.union(*(reach[one] for one in before)))
        unit = run[at].unit
        if unit.kind == "llm" and any(
            run[one].unit == unit for one in range(at) if one not in reach[at]
        ):
            return unit.name
    return None
