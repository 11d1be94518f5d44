"""Forms the batch of each step by rank alone: who is served, and who gives way."""

from collections.abc import Callable
from heapq import heapify, heappush
from typing import final

from demand.policies.base import Policy
from demand.simulation.engine.batch import Batch
from demand.simulation.engine.engine import Engine
from demand.simulation.engine.job_on_engine import NEVER, NOBODY, Calls, JobOnEngine
from demand.simulation.engine.order import PlacedJobs, RankOrder


@final
class Batcher:
    """Forms the batch of every step of an engine by rank, rules 1 to 3 of `Engine`.

    A batch goes on from the last one: requests that decode stay in it as long as no better one
    needs what they have. So only the others, those that wait and those whose prompt is not
    computed yet, are gone through in the order of service. One for which the batch has no request,
    tokens or blocks left displaces requests that decode and come after it in the order, the last
    one first. No other job is ranked.

    Attributes:
        order: the jobs with calls.
        batch: the requests chosen.
        partial: a job that has calls in the batch and others that wait; `None` if there is none.
        moved: whether being left out of the batch changed a rank, so that the next may be another.
        until: steps carried out when some job of the batch is to be checked
            (`JobOnEngine.check_step`).
        preemptions: times that a request was left out of the step after one it was in.
    """

    def __init__(self, engine: Engine, policy: Policy) -> None:
        self.batch = Batch(engine)
        self.order = RankOrder(policy, self.batch, engine.preemption != "none")
        self.partial: JobOnEngine | None = None
        self._joined: list[JobOnEngine] = []  # that run, and have calls since that do not yet
        self.moved = False
        self.until = 0
        self.preemptions = 0

    def form(self, now: float, warm: Callable[[JobOnEngine, float], bool]) -> None:
        """Choose the requests of the step that starts at second `now`.

        Args:
            now: second on the clock of the simulation.
            warm: asked, when the turn of a `cold` job comes, whether its backend is warm. If not,
                the job is left out, and the batch may be empty.
        """
        order, batch = self.order, self.batch
        batch.formed += 1
        again = self._to_serve_anew(now)
        batch.open()
        served: list[JobOnEngine] = []
        passed_over: list[JobOnEngine] = []
        self.partial = None
        while self.partial is None:
            first = order.first(again)
            if first is NOBODY:
                break
            last = None
            if not (batch.room and batch.budget):
                last = order.last_decoding_after(first, now)
                if last is None:
                    break
            job = order.pop(again)
            if job.cold:
                job.cold = False
                if not warm(job, now):
                    continue
            lacking = self._displace(job, last, again, now)
            room = batch.room
            if lacking is None:
                if not self._serve(job):
                    self.partial = job
            else:
                self._serve_all(lacking)
            (passed_over if batch.room == room else served).append(job)
        if batch.blocks.trims:
            batch.blocks.trim(batch.step)
        if again:
            passed_over += [job for _, job in again]
        self._part_running_from_waiting(served, passed_over, now)
        self._find_checks(now)
        batch.close()

    def advance(self, steps: int, now: float) -> tuple[list[JobOnEngine], list[JobOnEngine]]:
        """Carry out the step formed, `steps` times over, so that it ends at second `now`.

        Returns:
            The jobs whose present unit ended with it, or one of several perhaps, and those whose
            alarms may be due, both in order of arrival.
        """
        order, batch = self.order, self.batch
        touched = order.carry_out(steps, now)
        ended = []
        for job in touched:
            before = job.requests
            if batch.finish(job):
                order.count_service(job, now)
                order.leave(job)
                ended.append(job)
            elif job.waits is not None and job.requests < before:
                ended.append(job)
        alarmed = [job for job in touched if job.alarms and job.calls]
        if len(ended) > 1:
            ended.sort(key=_index)
        if len(alarmed) > 1:
            alarmed.sort(key=_index)
        return ended, alarmed

    def add(self, job: JobOnEngine, now: float) -> None:
        """Let `job` wait with the calls of a new unit."""
        self.order.add(job, now)

    def join(self, job: JobOnEngine, requests: int) -> None:
        """Let `requests` more calls of `job` wait, which has others that wait or run."""
        if job.running:
            self._joined.append(job)
        job.bound, job.exact = None, False

    def steps_in_order(self, now: float, most: int) -> int:
        """Steps after which another call may come before one of the batch, at most `most`."""
        if self.partial is None or not self.order.preemptive:
            return most
        return self.order.steps_of_partial(self.partial, now, most)

    def _to_serve_anew(self, now: float) -> PlacedJobs:
        """The jobs of the last batch that are to be served anew: not all of their calls decode.

        Where tokens or blocks do not suffice for all of the last batch, its last jobs are stopped,
        and are among those to be served anew.

        Returns:
            A heap of the jobs by their places.
        """
        order, batch, blocks = self.order, self.batch, self.batch.blocks
        anew: dict[JobOnEngine, tuple[int, int]] = {}
        for calls, _ in batch.prefilling:
            job = calls.job
            over = calls.generated == calls.output_tokens  # its job may be on another engine by now
            if not over and job not in anew and job.running and job.decoding != job.requests:
                anew[job] = self._asked(job)
        if self.partial is not None and self.partial not in anew:
            anew[self.partial] = (0, 0)
        if self._joined:
            for job in self._joined:
                if job.running:
                    anew.setdefault(job, (0, 0))
            self._joined = []
        budget = batch.engine.token_budget - batch.decoding
        free = blocks.free - blocks.growth(batch.step, 1)
        for tokens, needed in anew.values():
            budget -= tokens
            free -= needed
        if budget < 0 or free < 0:
            last = sorted(order.running, key=lambda job: order.rank(job, now))
            while budget < 0 or free < 0:
                job = last.pop()
                tokens, needed = anew.get(job, (0, 0))
                budget += job.decoding + tokens
                free += needed + blocks.growth(batch.step, 1)
                self.preemptions += job.decoding
                batch.stop(job)
                free -= blocks.growth(batch.step, 1)
                anew[job] = (0, 0)
        if order.reranks:
            order.rerank(now)
        again = [(order.rank(job, now), job) for job in anew]
        if len(again) > 1:
            heapify(again)
        return again

    def _asked(self, job: JobOnEngine) -> tuple[int, int]:
        """Tokens and blocks for the calls of `job` in the last batch that do not decode yet.

        They count as preempted until they are served.
        """
        batch = self.batch
        tokens = needed = 0
        for calls in job.calls:
            if calls.formed == batch.formed - 1:
                pending = calls.pending
                tokens += pending * calls.count
                needed += batch.blocks.needed(calls, pending) * calls.count
                self.preemptions += calls.count
        return tokens, needed

    def _displace(
        self, job: JobOnEngine, last: JobOnEngine | None, again: PlacedJobs, now: float
    ) -> list[tuple[Calls, int, int]] | None:
        """Stop those that decode and come after `job`, last first, until it has what it needs.

        Args:
            last: of those, if it is known.

        Returns:
            Tokens and blocks for each of its calls that do not decode; `None` where not all of
            them can have theirs.
        """
        batch, blocks = self.batch, self.batch.blocks
        requests = job.requests - job.decoding
        while requests > batch.room:
            last = last or self.order.last_decoding_after(job.place, now)
            if last is None:
                return None
            self._give_way(last, again)
            last = None
        tokens = needed = 0
        lacking = []
        size = blocks.block_tokens
        for calls in job.calls:
            if not calls.over:
                known = calls.input_tokens + calls.generated
                pending = known - calls.computed
                lacks = -(-known // size) - calls.blocks
                tokens += pending * calls.count
                needed += lacks * calls.count
                lacking.append((calls, pending, lacks))
        while tokens > batch.budget or needed > blocks.free:
            last = last or self.order.last_decoding_after(job.place, now)
            if last is None:
                return None
            self._give_way(last, again)
            last = None
        return lacking

    def _give_way(self, job: JobOnEngine, again: PlacedJobs) -> None:
        """Stop the calls of `job` that decode, so that others can be served."""
        if job.steady:
            heappush(again, (job.place, job))
        self.preemptions += job.decoding
        self.batch.displace(job)

    def _serve(self, job: JobOnEngine) -> bool:
        """Serve the calls of `job` that do not decode yet, as far as possible.

        Returns:
            Whether all of them are.
        """
        batch = self.batch
        for calls in job.calls:  # a part that is split off is next
            if calls.over:
                continue
            room, budget = batch.room, batch.budget
            if not (room and budget):
                return False
            pending = calls.input_tokens + calls.generated - calls.computed
            tokens = pending if pending < budget else budget
            if calls.count > room or calls.count * tokens > budget:
                job.split(calls, min(room, budget // tokens))
            if not batch.blocks.hold(calls, tokens, batch.step):
                return False
            if calls.formed == batch.formed - 1:
                self.preemptions -= calls.count
            batch.add(calls, tokens)
        return True

    def _serve_all(self, lacking: list[tuple[Calls, int, int]]) -> None:
        """Serve calls that do not decode yet, with their tokens and the blocks that each lacks."""
        batch, blocks = self.batch, self.batch.blocks
        last_formed = batch.formed - 1
        for calls, tokens, lacks in lacking:
            blocks.give(calls, lacks)
            if calls.formed == last_formed:
                self.preemptions -= calls.count
            batch.add(calls, tokens)

    def _part_running_from_waiting(
        self, served: list[JobOnEngine], passed_over: list[JobOnEngine], now: float
    ) -> None:
        """Let the jobs that have no call in the batch wait, and the others run."""
        order = self.order
        self.moved = False
        for job in passed_over:
            if job.decoding:
                self.partial = job
            else:
                place = job.place
                order.stop(job, now)
                self.moved |= job.place != place
        for job in served:
            order.start(job)
        if self.partial is not None and not self.partial.running:
            self.partial = None

    def _find_checks(self, now: float) -> None:
        """Find when each running job is to be checked, and `until`, when the first of them is."""
        order, partial, next_step = self.order, self.partial, self.batch.step + 1
        self.until = next_step
        if order.reranks:
            for job in order.running:
                job.bound, job.exact, job.check_step = None, False, next_step
            return
        if self.batch.prefilling:  # another batch is formed after this step anyway
            for job in order.running:
                if job.exact:
                    job.bound, job.exact = None, False
            return
        best = order.best_waiting
        if partial is not None:
            if not partial.exact:
                order.rank(partial, now)
            best = min(best, partial.place)
        until = NEVER
        for job in order.running:
            if job is not partial and (job.exact or job.bound is None or job.bound > best):
                order.find_bound(job, now, best)
                if job.bound is None:
                    until = next_step
            elif job.check_step < next_step:
                job.check_step = job.next_check(next_step - 1)
            if job.check_step < until:
                until = job.check_step
        self.until = until


def _index(job: JobOnEngine) -> int:
    return job.index
