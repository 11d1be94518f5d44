"""Who is served: the best ranked of the jobs present, and until when that surely stays so."""

from collections.abc import Hashable, Sequence

from demand.errors import DemandError
from demand.policies.base import Policy, Rank, rank_of
from demand.policies.exact_thresholds import just_below
from demand.policies.wrapper import hook
from demand.simulation.queue.job_in_service import Place, Task
from demand.simulation.queue.waiting import Heap, Lines, Waiting


class Servers:
    """Serves the jobs of least (rank, order of arrival), one on each server.

    A running task is looked at where its rank rises over the best one waiting; when that one gets
    worse, the look comes too early and changes nothing. Where places may have changed all running
    tasks are ranked.

    Attributes:
        running: tasks being served, in the order in which they were put there.
        settled: whether no waiting task goes before a running one; to be set to False where the
            rank of a running one may have risen.
        preemptions: times a running task was put back to wait.
    """

    def __init__(self, policy: Policy, servers: int) -> None:
        self.running: list[Task] = []
        self.settled = True
        self.preemptions = 0
        self._policy = policy
        self._served = hook(policy, "served")
        self._servers = servers
        self._arrived: list[Task] = []
        self._moved: set[Hashable] = set()
        self._lines = Lines(policy) if policy.reranks else None
        self._waiting: Waiting = Heap(policy) if self._lines is None else self._lines

    def add(self, task: Task) -> None:
        """Take in a task that has arrived; `decide` ranks it."""
        if self._lines is not None:
            self._lines.assign(task)
        self._arrived.append(task)

    def serve(self, stopped: Sequence[Task], now: float) -> None:
        """Account for service up to `now`: of the running tasks that reached their stop.

        Unless the policy reranks, the others are accounted for when they are next ranked.
        """
        if self._lines is not None:
            stopped = self.running
            for task in stopped:
                self._moved.add(task.line)
        for task in stopped:
            self._account(task, now)

    def look(self, task: Task, now: float) -> bool:
        """Look at a running task that reached its stop before the end of a unit.

        Returns:
            Whether that is an event.
        """
        self.settled = False
        return True

    def end_unit(self, task: Task) -> None:
        """Take note that a unit of a running task has ended, which may change its rank."""
        self.settled = False

    def leave(self, task: Task) -> None:
        """Take out a running task that has finished."""
        task.job.running = False
        self.running.remove(task)

    def decide(self, now: float) -> None:
        """Serve those that go first, once all that happens at `now` has happened."""
        waiting, running = self._waiting, self.running
        if self._lines is not None:
            self._lines.rerank(self._moved, now)
            self._moved.clear()
            self.settled = False
        if self._arrived:
            for task in self._arrived:
                if waiting.best is None and len(running) + len(self._arrived) <= self._servers:
                    self._start(task, now)
                    self._watch(task, now)
                    continue
                waiting.add(task, now)
                place = waiting.best
                if place is not None and place[2] is task:  # behind another, it changes nothing yet
                    self.settled = False
            self._arrived.clear()
        while len(running) < self._servers and waiting.best is not None:
            task = waiting.take(now)
            self._start(task, now)
            if self.settled:
                self._watch(task, now)
        if not self.settled:
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
        self.settled = True
        if waiting.best is not None:
            for task in running:
                self._rank(task, now)
            for _ in range(len(running)):
                worst = running[0] if self._servers == 1 else max(running, key=_place)
                if worst.place < waiting.best:
                    break
                best = self._swap(worst, now)
                if self._servers > 1:
                    self._rank(best, now)
        for task in running:
            self._watch(task, now)

    def _swap(self, worst: Task, now: float) -> Task:
        """Serve the best that waits in the stead of `worst`, which waits from now on."""
        self.preemptions += 1
        self.running.remove(worst)
        worst.job.running = False
        best = self._waiting.swap(worst, now)
        self._start(best, now)
        return best

    def _rank(self, task: Task, now: float) -> None:
        if task.since < now:
            self._account(task, now)
        task.place = task.bound = rank_of(task.job, self._policy, now), task.job.index

    def _watch(self, task: Task, now: float) -> None:
        """Find where a running task is to be looked at: the end of a unit, or a rank too high."""
        best = self._waiting.best
        if best is None:
            self._stop(task, None)
        else:  # at equal rank the earlier arrival goes first
            self._stop(task, best[0] if task.job.index < best[1] else just_below(best[0]))

    def _stop(self, task: Task, threshold: Rank | None) -> None:
        """Let a running task stop at the end of a unit, or where its rank exceeds `threshold`."""
        job = task.job
        attained = job.attained_service
        stop_age = task.ends[task.at]
        if threshold is not None:
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
        if self._served is not None:
            self._served(job, attained - before, now)


def _place(task: Task) -> Place:
    return task.place
