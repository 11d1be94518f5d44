"""The order in which the jobs of an engine are served, kept while their ranks change."""

from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import final

from demand.engine.tasks import Place, Task
from demand.policies.base import Policy
from demand.policies.ranking import rank_of


@final
class RankOrder:
    """Tasks with requests, best first: those of the last batch, and those waiting.

    The rank of a waiting job stands still (`Policy`), so that waiting tasks sit in a heap; those
    of the last batch are ranked anew for each step.

    Args:
        policy: ranks the jobs.
        preemptive: whether a better rank goes before a unit that has started.

    Attributes:
        running: tasks with a request in the last batch.
        fresh: of those, the ones with none in the batch before: their ranks are from then.
        waiting: heap of (place, task) of the others.
    """

    def __init__(self, policy: Policy, preemptive: bool) -> None:
        self.policy = policy
        self.preemptive = preemptive
        self.running: list[Task] = []
        self.fresh: list[Task] = []
        self.waiting: list[tuple[Place, Task]] = []
        self.started = 0

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, task: Task, now: float) -> None:
        """Let `task` wait with the requests of a new unit."""
        task.started = -1
        self._wait(task, now)

    def leave(self, task: Task) -> None:
        """Take out a running task whose requests are all finished."""
        task.job.running = False
        self.running.remove(task)

    def best_first(self, now: float) -> Iterator[Task]:
        """All tasks in order, taken out one by one as they are asked for; then call `settle`."""
        if self.policy.reranks:
            self.waiting = [(self.rank(task, now), task) for _, task in self.waiting]
            heapify(self.waiting)
        for task in self.running:
            self.rank(task, now)
        self.running.sort(key=_place, reverse=True)
        running, waiting = self.running, self.waiting
        while running or waiting:
            if running and (not waiting or running[-1].place < waiting[0][0]):
                yield running.pop()
            else:
                yield heappop(waiting)[1]

    def settle(self, served: list[Task], passed_over: Sequence[Task], now: float) -> None:
        """Take back what was taken out; running tasks that were not taken out wait from now on."""
        self.fresh = []
        for task in served:
            job = task.job
            if not job.running:
                self.fresh.append(task)
                job.running = True
                job.started_at = job.attained_service
            if task.started < 0:
                task.started = self.started
                self.started += 1
        for task in (*self.running, *passed_over):
            task.job.running = False
            self._wait(task, now)
        self.running = served

    def rank(self, task: Task, now: float) -> Place:
        """Rank `task` anew; its place.

        Raises:
            DemandError: a rank of NaN.
        """
        job = task.job
        if not self.preemptive and task.started >= 0:
            task.place = (0, task.started, job.index)
            return task.place
        rank = rank_of(job, self.policy, now)
        task.place = (0 if self.preemptive else 1, rank, job.index)
        return task.place

    def _wait(self, task: Task, now: float) -> None:
        heappush(self.waiting, (self.rank(task, now), task))


def _place(task: Task) -> Place:
    return task.place
