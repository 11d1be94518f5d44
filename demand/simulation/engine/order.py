"""The order in which the jobs of an engine are served, kept while their ranks change."""

import math
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from typing import final

from demand.policies.base import Policy, rank_of
from demand.policies.exact_thresholds import ROUNDING
from demand.policies.wrapper import hook
from demand.simulation.bounded_ranks import BoundedRanks, threshold
from demand.simulation.engine.batch import Batch
from demand.simulation.engine.job_on_engine import ANY, FIRST, NEVER, NOBODY, JobOnEngine, Place

PlacedJobs = list[tuple[Place, JobOnEngine]]
"""A heap of jobs by their places."""


@final
class RankOrder:
    """The jobs that have calls: those with calls in the batch, which run, and those that wait.

    The rank of a waiting job stands still (`Policy`), so that waiting jobs sit in a heap. A job
    that runs is ranked anew only when it may have come past its bound (`BoundedRanks`).

    Args:
        policy: ranks the jobs.
        batch: of the step to come; says how many steps have been carried out.
        preemptive: whether a better rank goes before a unit that has been served.

    Attributes:
        preemptive: as given.
        reranks: whether ranks are asked for, and service is told of, at each step: serving one job
            can change the rank of others (`Policy.reranks`), or its second counts (`by_clock`).
        running: jobs with a call in the last batch, in any order.
        waiting: heap of (place, job) of the others.
        best_waiting: place of the first of them, `NOBODY` if there is none.
    """

    def __init__(self, policy: Policy, batch: Batch, preemptive: bool) -> None:
        self.policy = policy
        self.reranks = policy.reranks or policy.by_clock
        self.preemptive = preemptive
        self.running: list[JobOnEngine] = []
        self.waiting: PlacedJobs = []
        self.best_waiting = NOBODY
        self._batch = batch
        self._served = hook(policy, "served")
        self._ranks = BoundedRanks(self.rank)
        self._units_served = 0

    def __bool__(self) -> bool:
        """Whether any job has calls."""
        return bool(self.running or self.waiting)

    def add(self, job: JobOnEngine, now: float) -> None:
        """Let `job` wait with the calls of a new unit."""
        job.first_served = -1
        self._wait(job, now)

    def moved(self, job: JobOnEngine, now: float) -> None:
        """The rank of `job` may be another, though it was not served, as a unit beside is over."""
        if job.running:
            job.bound, job.exact = None, False
            return
        self.waiting = [placed for placed in self.waiting if placed[1] is not job]
        heapify(self.waiting)
        self._wait(job, now)

    def first(self, again: PlacedJobs) -> Place:
        """Place of the first of the waiting and of the heap `again`, `NOBODY` if there is none."""
        best = self.best_waiting
        return again[0][0] if again and again[0][0] < best else best

    def pop(self, again: PlacedJobs) -> JobOnEngine:
        """Take out the first of the waiting and of the heap `again`."""
        if again and again[0][0] < self.best_waiting:
            return heappop(again)[1]
        job = heappop(self.waiting)[1]
        self.best_waiting = self.waiting[0][0] if self.waiting else NOBODY
        return job

    def put_back(self, job: JobOnEngine) -> None:
        """Let `job`, which was popped and waits still, stand where it stood."""
        heappush(self.waiting, (job.place, job))
        self.best_waiting = self.waiting[0][0]

    def start(self, job: JobOnEngine) -> None:
        """`job` has calls in the batch."""
        if job.first_served < 0:
            job.first_served = self._units_served
            self._units_served += 1
        if not job.running:
            job.running = True
            job.started_at = job.attained_service
            job.bound, job.exact = None, False  # running may have changed its rank
            self.running.append(job)

    def stop(self, job: JobOnEngine, now: float) -> None:
        """Let `job`, which has no calls in the batch, wait."""
        if job.running:
            self.leave(job)
        self._wait(job, now)

    def leave(self, job: JobOnEngine) -> None:
        """Take out a running job."""
        job.running = False
        self.running.remove(job)

    def rerank(self, now: float) -> None:
        """Rank all that wait anew."""
        self.waiting = [(self.place(job, now), job) for _, job in self.waiting]
        heapify(self.waiting)
        self.best_waiting = self.waiting[0][0] if self.waiting else NOBODY

    def rank(self, job: JobOnEngine, now: float) -> Place:
        """Rank a running job as of the steps carried out.

        Raises:
            DemandError: as `rank_of`.
        """
        if self._served is None:
            job.attained_service = job.attained(self._batch.step)
        else:
            self.count_service(job, now)
        job.bound = place = self.place(job, now)
        job.exact = True
        return place

    def carry_out(self, steps: int, now: float) -> Iterable[JobOnEngine]:
        """Carry out the step formed, `steps` times over, so that it ends at second `now`.

        Returns:
            The jobs of which something may be due: calls that were prefilled or are over, alarms.
        """
        batch, running = self._batch, self.running
        batch.advance(steps)
        step = batch.step
        touched = {calls.job: None for calls, _ in batch.prefilling}
        for job in running:
            if job.check_step <= step:
                touched[job] = None
        if self.reranks:  # who is served moves others, or when
            for job in running:
                self.count_service(job, now)
        for job in touched:
            if (
                job.bound is not None
                and job.bound_until < math.inf
                and job.attained(step) >= job.bound_until
            ):
                job.bound, job.exact = None, False
        return touched

    def count_service(self, job: JobOnEngine, now: float) -> None:
        """Count what `job` attained in the steps carried out."""
        attained = job.attained(self._batch.step)
        seconds = attained - job.attained_service
        job.attained_service = attained
        if self._served is not None and seconds > 0.0:
            self._served(job, seconds, now)

    def last_decoding_after(self, place: Place, now: float) -> JobOnEngine | None:
        """The last of the running jobs that decode, if it goes after `place`."""
        candidates = [
            job for job in self.running if job.decoding and (job.bound is None or job.bound > place)
        ]
        return self._ranks.last_after(candidates, place, now)

    def last_placed_after(self, place: Place, now: float) -> JobOnEngine | None:
        """The last of the running jobs that have a place in the engine, if it goes after `place`.

        Those of the same rank as `place` do not, whatever their order of arrival.
        """
        place = (place[0], place[1], NEVER)
        candidates = [
            job for job in self.running if job.placed and (job.bound is None or job.bound > place)
        ]
        return self._ranks.last_after(candidates, place, now)

    def find_bound(self, job: JobOnEngine, now: float, best: Place) -> None:
        """Bound the place of a running job half-way to `best`, and find when it is to be checked.

        The bound is `None` where the job goes after `best` already.
        """
        job.bound_until = math.inf
        if best is NOBODY:
            job.bound, job.exact = ANY, False
        else:
            group, rank, index = place = job.place if job.exact else self.rank(job, now)
            if place > best:
                job.bound, job.exact = None, False
            elif self.preemptive:
                highest = threshold(rank, index, best[1], best[2], halfway=True)
                job.bound, job.exact = (group, highest, index), False
                # Sooner than that: quanta may end a rounding sooner (`Policy.next_above`).
                job.bound_until = self.policy.next_above(job, highest) * (1.0 - ROUNDING)
        job.check_step = job.next_check(self._batch.step)

    def steps_of_partial(self, partial: JobOnEngine, now: float, most: int) -> int:
        """Steps for which `partial` stays behind all others that run, and before those that wait.

        The bounds of the others hold for all of the steps, at most `most`. `partial`, of which
        calls wait as well, is ranked step by step.
        """
        step, best, worst = self._batch.step, self.best_waiting, FIRST
        for job in self.running:
            if job is not partial:
                if job.bound is None:
                    return 1
                worst = max(worst, job.bound)
        steps = 0
        while steps < most and worst < partial.place < best:
            steps += 1
            partial.attained_service = partial.attained(step + steps)
            self.place(partial, now)
            partial.exact = False  # that is where it will stand
        partial.attained_service = partial.attained(step)
        return max(steps, 1)

    def place(self, job: JobOnEngine, now: float) -> Place:
        """Find the place of `job`, by what it has attained."""
        if self.preemptive:
            place = job.place = (0, rank_of(job, self.policy, now), job.index)
            return place
        if job.first_served >= 0:
            job.place = (0, job.first_served, job.index)
        else:
            job.place = (1, rank_of(job, self.policy, now), job.index)
        return job.place

    def _wait(self, job: JobOnEngine, now: float) -> None:
        heappush(self.waiting, (self.place(job, now), job))
        self.best_waiting = self.waiting[0][0]
