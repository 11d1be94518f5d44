"""Forms the batch of each step as vLLM does: running requests first, then those that wait."""

from collections.abc import Callable
from heapq import heapify, heappush, nsmallest
from typing import final

from demand.policies.base import Policy
from demand.simulation.engine.batch import Batch
from demand.simulation.engine.engine import Engine
from demand.simulation.engine.job_on_engine import FIRST, NEVER, NOBODY, Calls, JobOnEngine, Place
from demand.simulation.engine.order import PlacedJobs, RankOrder
from demand.simulation.engine.prefix_cache import PrefixCache

Warm = Callable[[JobOnEngine, float], bool]


@final
class RunningFirst:
    """Forms the batch of every step of an engine by the rules of `scheduling="running_first"`.

    Requests that run decode in every step, whatever their ranks, and nothing of them is touched.
    Ranks are asked for where they matter: of the jobs that wait, when a place may be had; of the
    running ones, where one of them may have to give way. Since the budget has a token for each
    running request, at most one of them has not computed all of its prompt, the one admitted last.

    Args:
        engine: its limits and times.
        policy: ranks the jobs.
        cache: what calls leave behind; its calls come one by one, none alike with another.

    Attributes:
        order: the jobs with calls.
        batch: the requests chosen.
        moved: whether the next batch may be another though nothing happens.
        until: steps carried out when some job of the batch is to be checked.
        preemptions: times that a running request lost its place.
    """

    def __init__(self, engine: Engine, policy: Policy, cache: PrefixCache | None = None) -> None:
        self.batch = Batch(engine)
        self.cache = cache
        self.order = RankOrder(policy, self.batch, preemptive=True)
        self.moved = False
        self.until = 0
        self.preemptions = 0
        self._displaces = engine.preemption == "recompute"
        self._resuming: list[Calls] = []  # that run and do not decode: new, or stalled
        self._partial: list[JobOnEngine] = []  # jobs some of whose calls run while others wait
        self._present = 0  # requests that run or wait
        self._admitted = 0

    def add(self, job: JobOnEngine, now: float) -> None:
        """Let `job` wait with the calls of a new unit."""
        self.order.add(job, now)
        self._present += job.requests

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
        again = [(order.rank(job, now), job) for job in self._partial]
        heapify(again)
        if self._displaces:
            self._displace(again, now, warm)
        turned: list[JobOnEngine] = []
        if self._lacks_blocks():
            self._serve_short_of_blocks(again, now)
            self.moved = True
        else:
            batch.open()
            self._serve_running()
            self._fit(now)
            self._admit(again, turned, now, warm)
        self._fit(now)
        self._partial = []
        for job in turned:
            self._settle(job, now)
        for _, job in again:
            self._settle(job, now)
        self._find_checks(now)
        batch.close()

    def advance(self, steps: int, now: float) -> tuple[list[JobOnEngine], list[JobOnEngine]]:
        """Carry out the step formed, `steps` times over, so that it ends at second `now`.

        Returns:
            The jobs whose present unit ended with it, and those whose alarms may be due, both in
            order of arrival.
        """
        order, batch = self.order, self.batch
        if self.cache is not None:
            self.cache.hold(batch.seconds(steps), now)
        batch.advance(steps)
        self._fit(now)
        step = batch.step
        touched = {calls.job: None for calls, _ in batch.prefilling}
        self._resuming += [calls for calls, _ in batch.prefilling]
        for job in order.running:
            if job.check_step <= step:
                touched[job] = None
        if order.reranks:  # who is served moves others
            for job in order.running:
                order.count_service(job, now)
        ended = []
        for job in touched:
            if job.bound is not None and job.attained(step) >= job.bound_until:
                job.bound, job.exact = None, False
            before, calls_before = job.requests, job.calls[:] if self.cache else []
            over = batch.finish(job)
            done = before - job.requests
            if not done:
                continue
            for calls in calls_before:
                if calls not in job.calls:
                    self._leave(calls, now, waits=False)
            self._present -= done
            job.placed -= done
            if over:
                order.count_service(job, now)
                order.leave(job)
                ended.append(job)
            elif not job.placed:  # its other calls wait
                order.count_service(job, now)
                self._partial.remove(job)
                order.stop(job, now)
        if self._resuming:
            self._resuming = [c for c in self._resuming if c.generated < c.output_tokens]
        if ended:
            self._partial = [job for job in self._partial if job.calls]
        alarmed = [job for job in touched if job.alarms and job.calls]
        ended.sort(key=_index)
        alarmed.sort(key=_index)
        return ended, alarmed

    def steps_in_order(self, now: float, most: int) -> int:
        """Steps after which another call may run because ranks have moved, at most `most`.

        The bounds of the jobs in the batch hold for all of them. Those of which calls wait as well
        are ranked step by step: none may come before the first that waits, and no rank that waits
        below one that runs.
        """
        order, partial = self.order, self._partial
        if self.cache is not None:
            most = self._steps_of_cache(most)
        if not partial:
            return most
        places = self.batch.engine.max_requests - self.batch.size
        if not places and not self._displaces:
            return most
        if places and self._displaces and self._present - self.batch.size > places:
            return 1
        worst = FIRST
        if not places:
            for job in order.running:
                if job.placed == job.requests:
                    if job.bound is None:
                        return 1
                    worst = max(worst, job.bound)
        first, steps, step = self._first_waiting(), 0, self.batch.step
        while steps < most:
            if places:
                if self._first_waiting() is not first:
                    break
            else:
                best = min(order.best_waiting, min(job.place for job in partial))
                best = (best[0], best[1], NEVER)
                if worst > best or any(job.place > best for job in partial):
                    break
            steps += 1
            for job in partial:
                job.attained_service = job.attained(step + steps)
                order.place(job, now)
                job.exact = False  # that is where it will stand
        for job in partial:
            job.attained_service = job.attained(step)
        return max(steps, 1)

    def _steps_of_cache(self, most: int) -> int:
        """Steps before what is given up or held may be something else, at most `most`."""
        cache, batch = self.cache, self.batch
        if cache is None or not cache.retention.moves:
            return most
        if self._present > batch.size and batch.room:  # what is held may lapse
            return 1
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            if batch.blocks.growth(batch.step + 1, middle - 1) + cache.total <= batch.blocks.free:
                low = middle
            else:
                high = middle - 1
        return low

    def _leave(self, calls: Calls, now: float, waits: bool) -> None:
        if self.cache is not None:
            self.cache.leave(calls, now, waits)

    def _fit(self, now: float) -> None:
        if self.cache is not None:
            self.cache.fit(self.batch.blocks.free, now)

    def _first_waiting(self) -> JobOnEngine | None:
        """The first of the jobs with calls that wait, if it is one of which others run."""
        first, best = None, self.order.best_waiting
        for job in self._partial:
            if job.place < best:
                first, best = job, job.place
        return first

    def _displace(self, again: PlacedJobs, now: float, warm: Warm) -> None:
        """Let the last of the running requests give way to better ones, by rule 1."""
        order, batch = self.order, self.batch
        running = batch.decoding + sum(calls.count for calls in self._resuming)
        places = batch.engine.max_requests - running
        if not running or self._present - running <= places:
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
                    self._present -= job.requests
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
            self._resuming += [calls for calls in job.calls if calls.over]
            self.batch.stop(job)

    def _lose(self, calls: Calls, most: int, again: PlacedJobs, now: float) -> Calls:
        """Take KV and place from the last of `calls`, which do not decode: `most` of them."""
        job = calls.job
        self._leave(calls, now, waits=True)
        if job.placed == job.requests:  # else it is among those already
            heappush(again, (job.place, job))
        lost = self.batch.blocks.lose(calls, most, self.batch.step)
        lost.admitted = -1
        job.placed -= lost.count
        self.preemptions += lost.count
        if lost is calls:
            self._resuming.remove(calls)
        return lost

    def _lacks_blocks(self) -> bool:
        """Whether there are too few for the requests that run."""
        batch, blocks = self.batch, self.batch.blocks
        needed = blocks.growth(batch.step, 1)
        if self._resuming:
            budget = batch.engine.token_budget - batch.decoding
            for calls in _prompts_last(self._resuming):
                tokens = min(calls.pending, budget)
                budget -= tokens * calls.count
                needed += blocks.needed(calls, tokens) * calls.count
        return needed > blocks.free

    def _serve_running(self) -> None:
        """Serve the requests that run and do not decode yet, for which there are blocks."""
        batch = self.batch
        for calls in _prompts_last(self._resuming):
            tokens = min(calls.pending, batch.budget)
            batch.blocks.give(calls, batch.blocks.needed(calls, tokens))
            batch.add(calls, tokens)
        self._resuming = []

    def _serve_short_of_blocks(self, again: PlacedJobs, now: float) -> None:
        """Serve the requests that run while there are too few blocks, by rule 2."""
        order, batch, blocks = self.order, self.batch, self.batch.blocks
        for job in order.running:
            self._stop(job)
            order.rank(job, now)
        batch.open()
        queue = sorted(self._resuming, key=_admitted)
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
                    self._resuming.append(rest)
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
        self._resuming = queue[len(scheduled) :]

    def _admit(self, again: PlacedJobs, turned: list[JobOnEngine], now: float, warm: Warm) -> None:
        """Admit requests that wait, by rule 3; their jobs are added to `turned`."""
        order, batch = self.order, self.batch
        while batch.room and batch.budget and order.first(again) is not NOBODY:
            job = order.pop(again)
            if job.cold:
                job.cold = False
                if not warm(job, now):
                    self._present -= job.requests
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
                free -= max(cache.held(now) - found, 0)
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
        self._fit(now)
        return batch.room > 0 and batch.budget > 0

    def _settle(self, job: JobOnEngine, now: float) -> None:
        """Let a job run, or wait, by whether it has a place."""
        order = self.order
        if job.placed:
            order.start(job)
            if job.placed < job.requests:
                self._partial.append(job)
        elif job.running:
            place = job.place
            order.stop(job, now)
            self.moved |= job.place != place
        else:
            order.put_back(job)

    def _find_checks(self, now: float) -> None:
        """Find when each running job is to be checked, and `until`, when the first of them is."""
        order, next_step = self.order, self.batch.step + 1
        self.until = next_step
        if order.reranks:
            for job in order.running:
                job.bound, job.exact, job.check_step = None, False, next_step
            return
        if self.moved or self.batch.prefilling:  # another batch is formed after this step anyway
            for job in order.running:
                if job.exact:
                    job.bound, job.exact = None, False
            return
        challenger, until = self._challenger(), NEVER
        for job in order.running:
            if job.placed == job.requests and (
                job.exact or job.bound is None or job.bound > challenger
            ):
                order.find_bound(job, now, challenger)
                if job.bound is None:
                    until = next_step
            elif job.check_step < next_step:
                job.check_step = job.next_check(next_step - 1)
            until = min(until, job.check_step)
        for job in self._partial:
            if not job.exact:
                order.rank(job, now)
        self.until = until

    def _challenger(self) -> Place:
        """Before which the running jobs must stay: that of the first that waits for no free place.

        `NOBODY` where there is none, or nobody gives way.
        """
        order, batch = self.order, self.batch
        running = batch.decoding
        places = batch.engine.max_requests - running
        if not self._displaces or self._present - running <= places:
            return NOBODY
        best = order.best_waiting
        if places:
            for place, job in nsmallest(places + 1, order.waiting):
                best = place
                places -= job.requests
                if places < 0:
                    break
        for job in self._partial:
            best = min(best, job.place)
        return best if best is NOBODY else (best[0], best[1], NEVER)


def _rest(calls: Calls, count: int) -> Calls:
    """Part all but the first `count` of `calls` from them, and give those."""
    calls.job.split(calls, count)
    return calls.job.calls[calls.job.calls.index(calls) + 1]


def _prompts_last(resuming: list[Calls]) -> list[Calls]:
    """Calls in the order in which they are served: the one that computes its prompt is last."""
    return sorted(resuming, key=_pending) if len(resuming) > 1 else resuming


def _pending(calls: Calls) -> int:
    return calls.pending


def _admitted(calls: Calls) -> tuple[int, int]:
    return calls.admitted, calls.number


def _place(calls: Calls) -> tuple[Place, int]:
    return calls.place


def _index(job: JobOnEngine) -> int:
    return job.index
