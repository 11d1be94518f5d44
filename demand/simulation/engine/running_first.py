"""Forms the batch of each step as vLLM does: running requests first, then those that wait."""

from heapq import heapify
from typing import final

from demand.policies.base import Policy
from demand.simulation.engine.batch import Batch
from demand.simulation.engine.engine import Engine
from demand.simulation.engine.job_on_engine import NOBODY, Calls, JobOnEngine
from demand.simulation.engine.order import PlacedJobs, RankOrder
from demand.simulation.engine.places import Places, Warm, admission
from demand.simulation.engine.prefix_cache import PrefixCache
from demand.simulation.engine.unchanged_order import find_checks, steps_in_order


@final
class RunningFirst:
    """Forms the batch of every step of an engine by the rules of `scheduling="running_first"`.

    Requests that run decode in every step, whatever their ranks, and nothing of them is touched.
    Ranks are asked for where they matter: of the jobs that wait, when a place may be had; of the
    running ones, where one of them may have to give way.

    Args:
        engine: its limits and times.
        policy: ranks the jobs.
        cache: what calls leave behind; its calls come one by one, none alike with another.

    Attributes:
        order: the jobs with calls.
        batch: the requests chosen.
        moved: whether the next batch may be another though nothing happens.
        until: steps carried out when some job of the batch is to be checked.
        places: the requests that run.
    """

    def __init__(self, engine: Engine, policy: Policy, cache: PrefixCache | None = None) -> None:
        self.batch = Batch(engine)
        self.cache = cache
        self.order = RankOrder(policy, self.batch, preemptive=True)
        self.moved = False
        self.until = 0
        self.places = Places(self.batch, self.order, cache)
        self._displaces = engine.preemption == "recompute"
        self._admitted = 0

    @property
    def preemptions(self) -> int:
        """Times that a running request lost its place."""
        return self.places.preemptions

    def add(self, job: JobOnEngine, now: float) -> None:
        """Let `job` wait with the calls of a new unit."""
        self.order.add(job, now)
        self.places.present += job.requests

    def join(self, job: JobOnEngine, requests: int) -> None:
        """Let `requests` more calls of `job` wait, which has others that wait or run."""
        self.places.present += requests
        if job.placed and job.placed == job.requests - requests:
            self.places.partial.append(job)
        job.bound, job.exact = None, False

    def form(self, now: float, warm: Warm) -> None:
        """Choose the requests of the step that starts at second `now`.

        Args:
            now: second on the clock of the simulation.
            warm: asked, when the turn of a `cold` job comes, whether its backend is warm. If not,
                the job is left out, and the batch may be empty.
        """
        order, batch = self.order, self.batch
        batch.formed += 1
        self.moved = False
        if order.reranks:
            order.rerank(now)
        again = [(order.rank(job, now), job) for job in self.places.partial]
        heapify(again)
        if self._displaces:
            self.places.displace(again, now, warm)
        turned: list[JobOnEngine] = []
        if self.places.lacks_blocks():
            self.places.serve_short_of_blocks(again, now)
            self.moved = True
        else:
            batch.open()
            self.places.serve()
            self.places.fit(now)
            self._admit(again, turned, now, warm)
        self.places.fit(now)
        self.places.partial = []
        for job in turned:
            self._settle(job, now)
        for _, job in again:
            self._settle(job, now)
        self.until = find_checks(self.places, self._displaces, self.moved, now)
        batch.close()

    def advance(self, steps: int, now: float) -> tuple[list[JobOnEngine], list[JobOnEngine]]:
        """Carry out the step formed, `steps` times over, so that it ends at second `now`.

        Returns:
            The jobs whose present unit ended with it, or one of several perhaps, and those whose
            alarms may be due, both in order of arrival.
        """
        order, batch = self.order, self.batch
        touched = order.carry_out(steps, now)
        self.places.resuming += [calls for calls, _ in batch.prefilling]
        ended, left = [], []
        for job in touched:
            before, calls_before = job.requests, job.calls[:] if self.cache else []
            over = batch.finish(job)
            done = before - job.requests
            if not done:
                continue
            left += [calls for calls in calls_before if calls not in job.calls]
            self.places.present -= done
            job.placed -= done
            if over:
                order.count_service(job, now)
                order.leave(job)
                ended.append(job)
                continue
            if job.waits is not None:
                ended.append(job)
            if not job.placed:  # its other calls wait
                order.count_service(job, now)
                self.places.partial.remove(job)
                order.stop(job, now)
        for calls in sorted(left, key=admission):
            self.places.leave(calls, now, waits=False)
        if self.places.resuming:
            self.places.resuming = [
                c for c in self.places.resuming if c.generated < c.output_tokens
            ]
        if ended:
            self.places.partial = [job for job in self.places.partial if job.calls]
        alarmed = [job for job in touched if job.alarms and job.calls]
        ended.sort(key=_index)
        alarmed.sort(key=_index)
        return ended, alarmed

    def steps_in_order(self, now: float, most: int) -> int:
        """Steps after which another call may run because ranks have moved, at most `most`."""
        return steps_in_order(self.places, self._displaces, now, most)

    def _admit(self, again: PlacedJobs, turned: list[JobOnEngine], now: float, warm: Warm) -> None:
        """Admit requests that wait, by rule 3; their jobs are added to `turned`."""
        order, batch = self.order, self.batch
        while batch.room and batch.budget and order.first(again) is not NOBODY:
            job = order.pop(again)
            if job.cold:
                job.cold = False
                if not warm(job, now):
                    self.places.present -= job.requests
                    continue
            turned.append(job)
            for calls in job.calls:  # a part that is split off is next
                if calls.admitted < 0 and not self._admit_calls(calls, now):
                    return

    def _admit_calls(self, calls: Calls, now: float) -> bool:
        """Admit as many of `calls` as can be; the others are parted from them.

        Returns:
            Whether others may be admitted after them.
        """
        batch, blocks, job = self.batch, self.batch.blocks, calls.job
        free, found, cache = blocks.free, 0, self.cache
        if cache is not None:
            found = cache.hit(calls)
            if batch.room < batch.engine.max_requests:  # else nobody runs
                free -= cache.held(now)
        pending = calls.pending
        count = min(calls.count, batch.room, free // blocks.needed(calls, pending))
        if count <= 0:
            return False
        if cache is not None:
            cache.take(calls, found)
            calls.computed = found * blocks.block_tokens
            pending -= calls.computed
            if calls.prefilled:  # what it lost and finds again is not computed again
                blocks.prefilled_again -= calls.computed
        tokens = min(pending, batch.budget)
        count = min(count, batch.budget // tokens)
        job.split(calls, count)
        calls.admitted = self._admitted
        self._admitted += 1
        job.placed += count
        blocks.give(calls, blocks.needed(calls, tokens))
        batch.add(calls, tokens)
        self.places.fit(now)
        return batch.room > 0 and batch.budget > 0

    def _settle(self, job: JobOnEngine, now: float) -> None:
        """Let a job run, or wait, by whether it has a place."""
        order = self.order
        if job.placed:
            order.start(job)
            if job.placed < job.requests:
                self.places.partial.append(job)
        elif job.running:
            place = job.place
            order.stop(job, now)
            self.moved |= job.place != place
        else:
            order.put_back(job)


def _index(job: JobOnEngine) -> int:
    return job.index
