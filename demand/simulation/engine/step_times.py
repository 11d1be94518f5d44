"""When each step of an engine began and ended, kept as stretches of steps that are alike."""

from array import array
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np

from demand.graph.run_columns import Ints
from demand.seconds import Floats
from demand.simulation.engine.compact import MOST, columns, move


@final
class StepLog:
    """Notes the stretches: steps that were carried out one after the other with one batch."""

    def __init__(self) -> None:
        self._stretches: list[float] = []  # three numbers each: the last of them
        self._moved = array("d")  # those before

    def add(self, end: float, steps: int, requests: int) -> None:
        """`steps` steps of `requests` requests took until second `end`, none where idle.

        They began when what was last noted ended.
        """
        stretches = self._stretches
        stretches += (end, steps, requests)
        if len(stretches) > MOST:
            move(stretches, self._moved)

    def times(self, kv_seconds_per_token: float) -> "StepTimes":
        """The times of all steps noted.

        Args:
            kv_seconds_per_token: of the engine; each step of a stretch reads one token a request
                more than the one before.
        """
        stretches = columns(self._stretches, self._moved, 3)
        begins = np.append(0.0, stretches[:-1, 0])[: len(stretches)]
        busy = stretches[:, 1] > 0
        ends, steps, requests = stretches[busy].T
        growth = kv_seconds_per_token * requests
        return StepTimes(steps.astype(np.int64), begins[busy], ends, growth)


@final
@dataclass(frozen=True, eq=False)
class StepTimes:
    """When each step began and ended. Steps are numbered from 0.

    Attributes:
        steps: `[s]` steps of each stretch.
        begins: `[s]` second at which it began.
        ends: `[s]` second at which it ended.
        growth: `[s]` seconds by which each of its steps is longer than the one before.
    """

    steps: Ints
    begins: Floats
    ends: Floats
    growth: Floats

    @cached_property
    def firsts(self) -> Ints:
        """`[s]` number of the first step of each stretch."""
        return np.cumsum(self.steps) - self.steps

    @cached_property
    def alike(self) -> bool:
        """Whether all steps of a stretch take equally long."""
        return not self.growth.any()

    def end(self, step: Ints) -> Floats:
        """`[n]` seconds at which the steps numbered `[n]` ended."""
        at = self._stretch(step)
        steps = step - self.firsts[at] + 1
        seconds = self.begins[at] + self._first(at) * steps + self._grown(at, steps)
        return np.where(steps == self.steps[at], self.ends[at], seconds)

    def seconds(self, step: Ints) -> Floats:
        """`[n]` that the steps numbered `[n]` took."""
        at = self._stretch(step)
        return self._first(at) + self.growth[at] * (step - self.firsts[at])

    def before(self, step: Ints) -> Floats:
        """`[n]` seconds that all steps before those numbered `[n]` took; idle ones do not count."""
        at = self._stretch(step)
        steps = step - self.firsts[at]
        return self._busy[at] + self._first(at) * steps + self._grown(at, steps)

    @cached_property
    def _busy(self) -> Floats:
        took = self.ends - self.begins
        return np.cumsum(took) - took

    def _stretch(self, step: Ints) -> Ints:
        return np.searchsorted(self.firsts, step, "right") - 1

    def _first(self, at: Ints) -> Floats:
        """Seconds of the first step of the stretches numbered `at`."""
        steps = self.steps[at]
        return (self.ends[at] - self.begins[at] - self._grown(at, steps)) / steps

    def _grown(self, at: Ints, steps: Ints) -> Floats:
        """Seconds that the first `steps` steps of stretches take beyond as many like the first."""
        return self.growth[at] * (steps * (steps - 1) // 2)
