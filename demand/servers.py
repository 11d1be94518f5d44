"""Who is served: the best ranked of the jobs present, and until when that surely stays so."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from typing import final

from demand.errors import DemandError
from demand.policies.base import Job, Policy, Rank
from demand.policies.ranking import rank_of
from demand.policies.thresholds import just_below


@final
@dataclass(slots=True, eq=False)
class Task:
    """A job in the queue, and how its service goes on.

    Attributes:
        job: the job.
        entry: its place in the workload.
        ends: attained service at the end of each of its units, its demand last.
        at: units finished.
        since: second as of which `job.attained_service` is known, while it is served.
        stop_age: attained service at which it is looked at, if nothing happens before.
        stop: second at which it attains that.
        rank: as it was when the running tasks were last compared.
    """

    job: Job
    entry: int
    ends: Sequence[float]
    at: int = 0
    since: float = 0.0
    stop_age: float = 0.0
    stop: float = math.inf
    rank: Rank = math.nan


@final
class Servers:
    """Serves the jobs of least (rank, order of arrival), one on each server.

    Waiting tasks sit in a heap by rank. A running task is looked at where its rank rises over the
    best one waiting; when that one gets worse, the look comes too early and changes nothing.

    Attributes:
        running: tasks being served.
        preemptions: times a running task was put back to wait.
        reranks: whether all tasks are accounted for and ranked at every event.
    """

    def __init__(self, policy: Policy, servers: int) -> None:
        self.running: list[Task] = []
        self.preemptions = 0
        self._policy = policy
        self.reranks = policy.reranks
        self._servers = servers
        self._arrived: list[Task] = []
        self._waiting: list[tuple[Rank, int, Task]] = []
        self._settled = True  # no waiting task goes before a running one

    def add(self, task: Task) -> None:
        """Take in a task that has arrived; `decide` ranks it."""
        self._arrived.append(task)

    def serve(self, stopped: Sequence[Task], now: float) -> None:
        """Account for service up to `now`: of the running tasks that reached their stop.

        Unless the policy reranks, the others are accounted for when they are next ranked.
        """
        for task in self.running if self.reranks else stopped:
            self._account(task, now)

    def unsettle(self) -> None:
        """Say that the rank of a running task may have risen."""
        self._settled = False

    def leave(self, task: Task) -> None:
        """Take out a running task that has finished."""
        task.job.running = False
        self.running.remove(task)

    def decide(self, now: float) -> None:
        """Serve those that go first, once all that happens at `now` has happened."""
        waiting, running = self._waiting, self.running
        if self.reranks:
            waiting[:] = [
                (rank_of(task.job, self._policy, now), at, task) for _, at, task in waiting
            ]
            heapify(waiting)
            self._settled = False
        for task in self._arrived:
            if not waiting and len(running) + len(self._arrived) <= self._servers:
                self._start(task, now)
                self._watch(task)
                continue
            heappush(waiting, (rank_of(task.job, self._policy, now), task.job.index, task))
            if waiting[0][2] is task:  # behind a better one, it changes nothing yet
                self._settled = False
        self._arrived.clear()
        while waiting and len(running) < self._servers:
            task = heappop(waiting)[2]
            self._start(task, now)
            if self._settled:
                self._watch(task)
        if not self._settled:
            self._settle(now)

    def _start(self, task: Task, now: float) -> None:
        job = task.job
        job.running = True
        job.started_at = job.attained_service
        task.since = now
        self.running.append(task)

    def _settle(self, now: float) -> None:
        """Let waiting tasks that go before running ones take their places."""
        waiting, running = self._waiting, self.running
        self._settled = True
        if waiting:
            for task in running:
                if task.since < now:
                    self._account(task, now)
                task.rank = rank_of(task.job, self._policy, now)
            for _ in range(len(running)):
                worst = running[0] if self._servers == 1 else max(running, key=_place)
                best_rank, best_index, best = waiting[0]
                index = worst.job.index
                if (worst.rank, index) < (best_rank, best_index):
                    break
                self.preemptions += 1
                running.remove(worst)
                worst.job.running = False
                heapreplace(waiting, (rank_of(worst.job, self._policy, now), index, worst))
                self._start(best, now)
                if self._servers > 1:
                    best.rank = rank_of(best.job, self._policy, now)
        for task in running:
            self._watch(task)

    def _watch(self, task: Task) -> None:
        """Find where a running task is to be looked at: the end of a unit, or a rank too high."""
        job = task.job
        attained = job.attained_service
        stop_age = task.ends[task.at]
        if self._waiting:
            best, index, _ = self._waiting[0]
            # At equal rank the earlier arrival goes first.
            threshold = best if job.index < index else just_below(best)
            age = self._policy.next_above(job, threshold)
            if age < stop_age:
                stop_age = age
            if not age > attained:
                raise DemandError(
                    f"{self._policy!r}.next_above gave {age} for job {job.index}, which has "
                    f"attained {attained} and goes first; expected a later age"
                )
        task.stop_age = stop_age
        task.stop = task.since + (stop_age - attained)

    def _account(self, task: Task, now: float) -> None:
        job, attained = task.job, task.stop_age
        before = job.attained_service
        if now < task.stop:
            reached = before + (now - task.since)
            if reached < attained:
                attained = reached
        job.attained_service = attained
        task.since = now
        self._policy.served(job, attained - before, now)


def _place(task: Task) -> tuple[Rank, int]:
    return task.rank, task.job.index
