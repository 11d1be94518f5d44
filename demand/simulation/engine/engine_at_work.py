"""An engine of a simulation: it forms batches, repeats their steps, and notes what it did."""

import math
from collections.abc import Sequence
from typing import final

from demand.policies.base import Policy
from demand.simulation.engine.batcher import Batcher
from demand.simulation.engine.engine import Engine
from demand.simulation.engine.identical_steps import identical_steps, steps_of_time
from demand.simulation.engine.places import Warm
from demand.simulation.engine.prefix_cache import PrefixCache
from demand.simulation.engine.running_first import RunningFirst
from demand.simulation.engine.served_requests import ServedRequests
from demand.simulation.engine.step_times import StepLog


@final
class EngineAtWork:
    """An engine that takes the steps of a batch together, as long as nothing changes.

    `form` a batch, and `carry_out` its step so many times; what becomes of its requests at their
    end is `batcher.advance`. Where something may come in before that, `begin` the steps instead,
    `cut` them when it does, and `end_steps`.

    Args:
        engine: its limits and times.
        policy: ranks the jobs.
        cache: what calls leave behind; `None` where nothing stays.

    Attributes:
        batcher: forms its batches.
        batch: the last one formed.
        order: the jobs that are here.
        cache: as given.
        steps: carried out, or begun.
        decisions: batches formed.
        busy_seconds: what the steps took.
        step_log: when they were.
        end: second at which the steps that were begun end; infinity if none are under way.
    """

    def __init__(self, engine: Engine, policy: Policy, cache: PrefixCache | None) -> None:
        self.batcher = (
            RunningFirst(engine, policy, cache)
            if engine.scheduling == "running_first"
            else Batcher(engine, policy)
        )
        self.batch = self.batcher.batch
        self.order = self.batcher.order
        self.cache = cache
        self.steps = 0
        self.decisions = 0
        self.busy_seconds = 0.0
        self.step_log = StepLog()
        self.end = math.inf
        self._begun = self._ended = 0.0
        self._repeated = 0
        self._carried_out = True

    def rest(self, now: float) -> None:
        """There was nothing to do up to second `now`."""
        self.step_log.add(now, 0, 0)

    def form(self, now: float, warm: Warm) -> bool:
        """Choose the requests of the step that starts at second `now`; whether there are any."""
        self.batcher.form(now, warm)
        self.decisions += 1
        return self.batch.size > 0

    def carry_out(self, steps: int, now: float) -> float:
        """Carry out the step formed, `steps` times over from second `now` on.

        Returns:
            The second at which the last of them ends.
        """
        batch = self.batch
        seconds = batch.seconds(steps)
        if self.cache is not None:
            self.cache.carry_out(batch, steps, now)
        now += seconds
        self.step_log.add(now, steps, batch.size)
        self.busy_seconds += seconds
        self.steps += steps
        return now

    def begin(self, now: float, until: float) -> None:
        """Begin to repeat the step formed, until second `until` is reached or it would change."""
        if self._ended < now:
            self.rest(now)
        self._begun = now
        self._repeated = identical_steps(self.batcher, now, until)
        self.end = now + self.batch.seconds(self._repeated)
        self._carried_out = False

    def cut(self, now: float) -> None:
        """Something comes in at second `now`: no step begins from then on, before `end_steps`."""
        if not self._carried_out:
            self._repeated = self._steps_by(now)
            self._finish()

    def end_steps(self) -> int:
        """How many steps were begun, which now have ended."""
        if not self._carried_out:
            self._finish()
        self._ended, self.end = self.end, math.inf
        return self._repeated

    def blocks_held(self, now: float) -> int:
        """Blocks that requests hold in the step under way at second `now`, or hold between two."""
        free = self.batch.blocks.free
        if self.end < math.inf:
            free = self.batch.free_after(self._steps_by(now))
        return self.batch.engine.blocks - free

    def served(self, applications: Sequence[str]) -> ServedRequests:
        """What became of its requests; `applications` are those of all jobs, in order."""
        engine = self.batch.engine
        times = engine.kv_seconds_per_token, engine.block_tokens
        return ServedRequests(self.batch.log, self.step_log, *times, applications)

    def _finish(self) -> None:
        self._carried_out = True
        self.end = self.carry_out(self._repeated, self._begun)

    def _steps_by(self, now: float) -> int:
        """Of the steps under way, those begun before second `now`, and at least one."""
        return steps_of_time(self.batcher, self._begun, now, self._repeated)
