"""The KV that calls have left on the device, and what later calls find of it."""

from typing import final

import numpy as np

from demand.simulation.engine.batch import Batch
from demand.simulation.engine.engine import Engine
from demand.simulation.engine.job_on_engine import Calls, JobOnEngine
from demand.simulation.engine.result import Prefixes
from demand.simulation.engine.retention import LeftKV, Tables

Key = tuple[int, str, int]
"""Index of the job, name of the unit, number of the call within the unit."""

LastCalls = dict[int, dict[tuple[str, int], int]]
"""By index of the job, then name of the unit and number of the call: blocks of its last call."""


@final
class PrefixCache:
    """Overlay on the blocks of an engine: which of those that no request holds still have KV.

    A call finds what the last call of its number of the same unit left, as far as its prompt
    shares tokens with that one (`Execution.shared_tokens`); a request that lost its place finds its
    own. Whole blocks only, and never the last token, which is computed to go on from. Where a run
    had calls on other engines meanwhile, no more is found than all of these shared.

    Args:
        engine: which of it is given up first, and how much there is room for.
        tables: what the retention knows of each unit.
        ended: of all runs, shared by the engines that serve them; `None` for one engine.

    Attributes:
        retention: of the engine.
        total: blocks with KV that no request holds.
        looked_up: prompt tokens of requests when they were first admitted.
        found: of those, tokens whose KV was there.
        findable: of those, tokens in whole blocks that it shares with the last call, on whichever
            engine, where there was one.
        held_block_seconds: blocks held as each step begins, times its seconds.
    """

    def __init__(self, engine: Engine, tables: Tables, ended: LastCalls | None = None) -> None:
        assert engine.retention is not None
        self.retention = engine.retention
        self.total = 0
        self.looked_up = 0
        self.found = 0
        self.findable = 0
        self.held_block_seconds = 0.0
        self._tables = tables
        self._block_tokens = engine.block_tokens
        self._limit = int(engine.retention.limit * engine.blocks)
        self._left: dict[LeftKV, Key | None] = {}  # in the order of use
        self._by_key: dict[Key, LeftKV] = {}
        self._ended: LastCalls = {} if ended is None else ended
        self._used = 0

    def leave(self, calls: Calls, now: float, waits: bool) -> None:
        """A single call, which has its tokens written down, is over or has lost its place."""
        blocks = calls.computed // self._block_tokens
        job, key = calls.job, self._key(calls)
        self._forget(key)
        if not waits:
            self._ended.setdefault(job.index, {})[key[1:]] = blocks
        if not blocks:
            return
        unit = key[1]
        table = self._tables.of(job.application, unit)
        left = LeftKV(job.application, unit, blocks, now, self._used, waits=waits, table=table)
        left.wanted = now if waits else None
        self._used += 1
        self._left[left] = key
        self._by_key[key] = left
        self.total += blocks

    def ask(self, job: JobOnEngine, now: float) -> None:
        """The calls of the unit of `job` that began last are asked for."""
        for calls in (each for each in job.calls if each.position == job.position):
            left = self._by_key.get(self._key(calls))
            if left is not None:
                left.wanted = now

    def knows(self, job: JobOnEngine) -> bool:
        """Whether a call of the run of `job` may still find something here."""
        return any(key[0] == job.index for key in self._by_key)

    def ask_elsewhere(self, job: JobOnEngine) -> None:
        """The calls of the present unit of `job` are asked of another engine."""
        for calls in job.calls:
            left = self._by_key.get(self._key(calls))
            if left is not None:
                left.elsewhere = True
                left.reach = min(left.reach, calls.shared_tokens // self._block_tokens)

    def found_tokens(self, job: JobOnEngine) -> int:
        """Tokens that the calls of the present unit of `job`, which wait, would find now."""
        return sum(self.hit(calls) for calls in job.calls) * self._block_tokens

    def hit(self, calls: Calls) -> int:
        """How many blocks `calls`, a single one that waits, would find now."""
        left = self._by_key.get(self._key(calls))
        if left is None:
            return 0
        known = calls.input_tokens + calls.generated
        shared = known if left.waits else min(calls.shared_tokens, known)
        return min(left.blocks, left.reach, min(shared, known - 1) // self._block_tokens)

    def take(self, calls: Calls, blocks: int) -> None:
        """Give `calls` the first `blocks` that it finds; what is left of them is of no use."""
        key = self._key(calls)
        if not calls.prefilled:
            self.looked_up += calls.input_tokens
            self.found += blocks * self._block_tokens
            shared = min(calls.shared_tokens, calls.input_tokens - 1)
            last = self._ended.get(key[0], {}).get(key[1:], 0)
            self.findable += min(shared // self._block_tokens, last) * self._block_tokens
        left = self._by_key.get(key)
        if left is None:
            return
        left.blocks -= blocks
        self.total -= blocks
        self._forget(key)

    def end(self, job: JobOnEngine) -> None:
        """The run of `job` is over."""
        self._ended.pop(job.index, None)
        for key in [key for key in self._by_key if key[0] == job.index]:
            self._forget(key)

    def fit(self, free: int, now: float) -> None:
        """Give up KV until it fits into `free` blocks, those that no request holds."""
        excess = self.total - free
        while excess > 0:
            left = max(self._left, key=lambda one: self.retention.rank(one, now))
            gone = min(left.blocks, excess)
            left.blocks -= gone
            excess -= gone
            self.total -= gone
            if not left.blocks:
                key = self._left.pop(left)
                if key is not None:
                    del self._by_key[key]

    def held(self, now: float) -> int:
        """Blocks kept from requests that wait, those of least rank first up to the limit."""
        if not self._limit:
            return 0
        retention = self.retention
        found = [x for x in self._left if not x.elsewhere and retention.holds(x, now)]
        return min(sum(left.blocks for left in found), self._limit)

    def carry_out(self, batch: Batch, steps: int, now: float) -> None:
        """The step of `batch` begins at second `now`, and is carried out `steps` times over."""
        if self._limit:
            self.held_block_seconds += self._held_over(batch, steps, now)
        self.fit(batch.free_after(steps), now)

    def _held_over(self, batch: Batch, steps: int, now: float) -> float:
        """Blocks held at the beginning of each step, times its seconds, over all of them."""
        if self.retention.moves and steps > 1:  # nothing is given up but in the last step
            ends = [batch.seconds(step) for step in range(1, steps + 1)]
            starts = np.array([0.0, *ends[:-1]])
            held = np.zeros(steps)
            for left in self._left:
                if not left.elsewhere:
                    held += left.blocks * self.retention.holds_at(left, now + starts)
            return float(np.minimum(held, self._limit) @ (np.array(ends) - starts))
        if self.total <= batch.free_after(steps):
            return self.held(now) * batch.seconds(steps)
        found, before = 0.0, 0.0
        for step in range(1, steps + 1):
            self.fit(batch.free_after(step), now)
            after = batch.seconds(step)
            found += self.held(now) * (after - before)
            before = after
        return found

    def report(self) -> Prefixes:
        """What was looked up and found."""
        return Prefixes(self.looked_up, self.found, self.findable, self.held_block_seconds)

    def _key(self, calls: Calls) -> Key:
        return (calls.job.index, calls.job.run[calls.position].unit.name, calls.number)

    def _forget(self, key: Key) -> None:
        """No call will find what is under `key`; its blocks lie there until they are given up."""
        left = self._by_key.pop(key, None)
        if left is None:
            return
        left.of_run = False
        self._left[left] = None
        if not left.blocks or self.retention.knows_ends:
            del self._left[left]
            self.total -= left.blocks
