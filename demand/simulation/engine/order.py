"""The order in which the jobs of an engine are served, kept while their ranks change."""

import math
from heapq import heapify, heappop, heappush
from typing import final

from demand.policies.base import Policy, rank_of
from demand.policies.exact_thresholds import half_way, just_below
from demand.policies.wrapper import hook
from demand.simulation.engine.job_on_engine import ANY, NOBODY, UNKNOWN, Place, Task

Waiting = list[tuple[Place, Task]]


@final
class RankOrder:
    """Tasks with calls: those of the last batch, and those waiting.

    The rank of a waiting job stands still (`Policy`), so that waiting tasks sit in a heap. A task
    of the batch is ranked anew only when its place may have passed its `Task.bound`.

    Args:
        policy: ranks the jobs.
        preemptive: whether a better rank goes before a unit that has started.

    Attributes:
        reranks: whether serving one job can change the rank of others (`Policy.reranks`).
        running: tasks with a call in the last batch, in any order.
        waiting: heap of (place, task) of the others.
        best_waiting: place of the first of them, `NOBODY` if there is none.
    """

    def __init__(self, policy: Policy, preemptive: bool) -> None:
        self.policy = policy
        self.reranks = policy.reranks
        self._served = hook(policy, "served")
        self.preemptive = preemptive
        self.running: list[Task] = []
        self.waiting: Waiting = []
        self.best_waiting = NOBODY
        self._started = 0

    def __bool__(self) -> bool:
        """Whether anybody has calls."""
        return bool(self.running or self.waiting)

    def add(self, task: Task, now: float) -> None:
        """Let `task` wait with the calls of a new unit."""
        task.started = -1
        self._wait(task, now)

    def first(self, again: Waiting) -> Place:
        """Place of the first of the waiting and of the heap `again`, `NOBODY` if there is none."""
        best = self.best_waiting
        return again[0][0] if again and again[0][0] < best else best

    def pop(self, again: Waiting) -> Task:
        """Take out the first of the waiting and of the heap `again`."""
        if again and again[0][0] < self.best_waiting:
            return heappop(again)[1]
        task = heappop(self.waiting)[1]
        self.best_waiting = self.waiting[0][0] if self.waiting else NOBODY
        return task

    def start(self, task: Task) -> None:
        """Take note that `task` has calls in the batch."""
        job = task.job
        if task.started < 0:
            task.started = self._started
            self._started += 1
        if not job.running:
            job.running = True
            job.started_at = job.attained_service
            task.bound = UNKNOWN  # running may have changed its rank
            self.running.append(task)

    def stop(self, task: Task, now: float) -> None:
        """Let `task`, which has no calls in the batch, wait."""
        if task.job.running:
            self.leave(task)
        self._wait(task, now)

    def leave(self, task: Task) -> None:
        """Take out a task of the batch."""
        task.job.running = False
        self.running.remove(task)

    def rerank(self, now: float) -> None:
        """Rank all that wait anew."""
        self.waiting = [(self.place(task, now), task) for _, task in self.waiting]
        heapify(self.waiting)
        self.best_waiting = self.waiting[0][0] if self.waiting else NOBODY

    def rank(self, task: Task, now: float, step: int) -> Place:
        """Rank a running task anew, as of `step` steps carried out; its place, and its bound.

        Raises:
            DemandError: a rank of NaN.
        """
        if self._served is None:
            task.job.attained_service = task.attained(step)
        else:
            self.account(task, now, step)
        task.bound = place = self.place(task, now)
        return place

    def account(self, task: Task, now: float, step: int) -> None:
        """Give the job of `task` the service of `step` steps carried out."""
        job, attained = task.job, task.attained(step)
        seconds = attained - job.attained_service
        job.attained_service = attained
        if self._served is not None and seconds > 0.0:
            self._served(job, seconds, now)

    def watch(self, task: Task, now: float, step: int, best: Place) -> None:
        """Find a bound on the place of a running task, and until when it holds.

        It lies half-way to `best`, so that it need not be found again when `best` gets better.
        """
        task.bound_holds_until = math.inf
        if best is NOBODY:
            task.bound = ANY
        else:
            place = task.place if task.bound is task.place else self.rank(task, now, step)
            if place > best:
                task.bound = UNKNOWN
            elif self.preemptive:
                threshold = half_way(place[1], best[1])
                if threshold == best[1] and place[2] > best[2]:
                    threshold = just_below(threshold)
                task.bound = (place[0], threshold, place[2])
                attained = self.policy.next_above(task.job, threshold)
                # Sooner than later: quanta are counted with a slack (`policies.quanta`).
                task.bound_holds_until = attained * (1.0 - 1e-9)
        task.look = task.next_look(step)

    def place(self, task: Task, now: float) -> Place:
        """Find the place of `task`, by what its job has attained."""
        job = task.job
        if self.preemptive:
            place = task.place = (0, rank_of(job, self.policy, now), job.index)
            return place
        if task.started >= 0:
            task.place = (0, task.started, job.index)
        else:
            task.place = (1, rank_of(job, self.policy, now), job.index)
        return task.place

    def _wait(self, task: Task, now: float) -> None:
        heappush(self.waiting, (self.place(task, now), task))
        self.best_waiting = self.waiting[0][0]
