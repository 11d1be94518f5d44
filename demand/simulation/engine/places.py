"""Who has a place in an engine that serves running requests first, and who loses it."""

from collections.abc import Callable
from heapq import heappush
from typing import final

from demand.simulation.engine.batch import Batch
from demand.simulation.engine.job_on_engine import NOBODY, Calls, JobOnEngine, Place
from demand.simulation.engine.order import PlacedJobs, RankOrder
from demand.simulation.engine.prefix_cache import PrefixCache

Warm = Callable[[JobOnEngine, float], bool]


@final
class Places:
    """The requests that run: rules 1 and 2 of `Engine` with `scheduling="running_first"`.

    Since the budget has a token for each running request, at most one of them has not computed all
    of its prompt, the one admitted last.

    Args:
        batch: of the step to come.
        order: the jobs with calls.
        cache: what calls leave behind.

    Attributes:
        resuming: calls that run and do not decode: new ones, and those left out of the last step.
        partial: jobs some of whose calls run while others wait.
        present: requests that run or wait.
        preemptions: times that a running request lost its place.
    """

    def __init__(self, batch: Batch, order: RankOrder, cache: PrefixCache | None) -> None:
        self.batch = batch
        self.order = order
        self.cache = cache
        self.resuming: list[Calls] = []
        self.partial: list[JobOnEngine] = []
        self.present = 0
        self.preemptions = 0

    def displace(self, again: PlacedJobs, now: float, warm: Warm) -> None:
        """Let the last of the running requests give way to better ones, by rule 1."""
        order, batch = self.order, self.batch
        running = batch.decoding + sum(calls.count for calls in self.resuming)
        places = batch.engine.max_requests - running
        if not running or self.present - running <= places:
            return
        if order.last_placed_after(order.first(again), now) is None:
            return
        popped = []
        while order.first(again) is not NOBODY:
            job = order.pop(again)
            waiting = job.requests - job.placed
            if waiting <= places:
                places -= waiting
                popped.append(job)
                continue
            victim = order.last_placed_after(job.place, now)
            if victim is not None and job.cold:
                job.cold = False
                if not warm(job, now):
                    self.present -= job.requests
                    continue
            popped.append(job)
            wanted, places = waiting - places, 0
            while wanted and victim is not None:
                wanted -= self._give_way(victim, wanted, again, now)
                victim = order.last_placed_after(job.place, now)
            if victim is None:
                break
        for job in popped:
            heappush(again, (job.place, job))

    def _give_way(self, job: JobOnEngine, most: int, again: PlacedJobs, now: float) -> int:
        """Take their places from the last of the running calls of `job`, at most `most` of them.

        Returns:
            How many gave way.
        """
        self._stop(job)
        gone = 0
        for calls in reversed(job.calls[:]):
            if gone < most and calls.admitted >= 0:
                gone += self._lose(calls, most - gone, again, now).count
        return gone

    def _stop(self, job: JobOnEngine) -> None:
        """Take out the calls of `job` that decode: they are to be served anew, or give way."""
        if job.decoding:
            self.resuming += [calls for calls in job.calls if calls.over]
            self.batch.stop(job)

    def _lose(self, calls: Calls, most: int, again: PlacedJobs, now: float) -> Calls:
        """Take KV and place from the last of `calls`, which do not decode: `most` of them."""
        job = calls.job
        self.leave(calls, now, waits=True)
        if job.placed == job.requests:  # else it is among those already
            heappush(again, (job.place, job))
        lost = self.batch.blocks.lose(calls, most, self.batch.step)
        lost.admitted = -1
        job.placed -= lost.count
        self.preemptions += lost.count
        if lost is calls:
            self.resuming.remove(calls)
        return lost

    def lacks_blocks(self) -> bool:
        """Whether there are too few for the requests that run."""
        batch, blocks = self.batch, self.batch.blocks
        needed = blocks.growth(batch.step, 1)
        if self.resuming:
            budget = batch.engine.token_budget - batch.decoding
            for calls in _prompts_last(self.resuming):
                tokens = min(calls.pending, budget)
                budget -= tokens * calls.count
                needed += blocks.needed(calls, tokens) * calls.count
        return needed > blocks.free

    def serve(self) -> None:
        """Serve the requests that run and do not decode yet, for which there are blocks."""
        batch = self.batch
        for calls in _prompts_last(self.resuming):
            tokens = min(calls.pending, batch.budget)
            batch.blocks.give(calls, batch.blocks.needed(calls, tokens))
            batch.add(calls, tokens)
        self.resuming = []

    def serve_short_of_blocks(self, again: PlacedJobs, now: float) -> None:
        """Serve the requests that run while there are too few blocks, by rule 2."""
        order, batch, blocks = self.order, self.batch, self.batch.blocks
        for job in order.running:
            self._stop(job)
            order.rank(job, now)
        batch.open()
        queue = sorted(self.resuming, key=admission)
        budget = batch.budget
        scheduled: list[int] = []  # tokens of each request of the queue that is served
        tokens = 0  # of the request whose turn it is, kept while others give way to it
        while len(scheduled) < len(queue):
            calls = queue[len(scheduled)]
            tokens = tokens or min(calls.pending, budget)
            needed = blocks.needed(calls, tokens)
            possible = blocks.free // needed if needed else calls.count
            if possible:
                if possible < calls.count:
                    rest = _rest(calls, possible)
                    queue.insert(len(scheduled) + 1, rest)
                    self.resuming.append(rest)
                blocks.give(calls, needed)
                budget -= tokens * calls.count
                scheduled.append(tokens)
                tokens = 0
                continue
            last = max(queue, key=_place)
            at = queue.index(last)
            lost = self._lose(last, 1, again, now)
            if at < len(scheduled):
                budget += scheduled[at]
            if lost is last:
                del queue[at]
                if at == len(scheduled):
                    break
                del scheduled[at : at + 1]
        for calls, tokens in zip(queue, scheduled, strict=False):
            batch.add(calls, tokens)
        self.resuming = queue[len(scheduled) :]

    def leave(self, calls: Calls, now: float, waits: bool) -> None:
        """`calls` leave what KV they have for their run; if they `waits`, for themselves."""
        if self.cache is not None:
            self.cache.leave(calls, now, waits)

    def fit(self, now: float) -> None:
        """What was left lies in free blocks: give up what no longer fits."""
        if self.cache is not None:
            self.cache.fit(self.batch.blocks.free, now)


def _rest(calls: Calls, count: int) -> Calls:
    """Part all but the first `count` of `calls` from them, and give those."""
    calls.job.split(calls, count)
    return calls.job.calls[calls.job.calls.index(calls) + 1]


def _prompts_last(resuming: list[Calls]) -> list[Calls]:
    """Calls in the order in which they are served: the one that computes its prompt is last."""
    return sorted(resuming, key=_pending) if len(resuming) > 1 else resuming


def _pending(calls: Calls) -> int:
    return calls.pending


def admission(calls: Calls) -> tuple[int, int]:
    """Sorts calls by when they were admitted."""
    return calls.admitted, calls.number


def _place(calls: Calls) -> tuple[Place, int]:
    return calls.place
