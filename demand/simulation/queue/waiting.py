"""The tasks that wait for a server, best first."""

from collections.abc import Hashable, Iterable
from heapq import heappop, heappush, heapreplace
from typing import Protocol, final

from demand.errors import DemandError
from demand.policies.base import Policy, Rank, rank_of
from demand.simulation.queue.job_in_service import Task

WaitingPlace = tuple[Rank, int, Task]
"""Rank, order of arrival, and whose they are."""


class Waiting(Protocol):
    """Tasks that wait, the best first.

    Attributes:
        best: place of the one that goes first; None if none waits.
    """

    best: WaitingPlace | None

    def add(self, task: Task, now: float) -> None:
        """Let `task` wait from second `now` on."""

    def take(self, now: float) -> Task:
        """Take out the best."""

    def swap(self, task: Task, now: float) -> Task:
        """Take out the best and let `task` wait in its stead."""


@final
class Heap:
    """Waiting tasks whose ranks stand still."""

    __slots__ = ("_heap", "_policy", "best")

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: list[WaitingPlace] = []
        self.best: WaitingPlace | None = None

    def add(self, task: Task, now: float) -> None:
        """Ranked as of `now`."""
        job, heap = task.job, self._heap
        heappush(heap, (rank_of(job, self._policy, now), job.index, task))
        self.best = heap[0]

    def take(self, now: float) -> Task:
        """In O(log n)."""
        heap = self._heap
        task = heappop(heap)[2]
        self.best = heap[0] if heap else None
        return task

    def swap(self, task: Task, now: float) -> Task:
        """In O(log n), at once."""
        job, heap = task.job, self._heap
        best = heapreplace(heap, (rank_of(job, self._policy, now), job.index, task))
        self.best = heap[0]
        return best[2]


@final
class Lines:
    """Waiting tasks of a policy that `reranks`, in lines that keep their order (`Policy.line`).

    Only the first of each line is ranked, and anew only when its line may have moved: one that
    was served, or any line at all while one of them has no name.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._first: dict[Hashable, WaitingPlace] = {}
        self._behind: dict[Hashable, list[tuple[int, Task]]] = {}
        self._named = True  # all lines have names, so that it is known whose ranks move
        self.best: WaitingPlace | None = None

    def assign(self, task: Task) -> None:
        """Give a task that has arrived its line; where the policy has none, one of its own."""
        line = self._policy.line(task.job)
        self._named = self._named and line is not None
        task.line = task.job if line is None else line

    def rerank(self, moved: Iterable[Hashable], now: float) -> None:
        """Rank anew, now that tasks of these lines were served."""
        first = self._first
        for line in moved if self._named else first:
            if line in first:
                _, index, task = first[line]
                first[line] = rank_of(task.job, self._policy, now), index, task
        self._look()

    def add(self, task: Task, now: float) -> None:
        """Ranked as of `now`."""
        self._join(task, now)
        self._look()

    def take(self, now: float) -> Task:
        """The next in its line is ranked, as of `now`."""
        task = self._leave(now)
        self._look()
        return task

    def swap(self, task: Task, now: float) -> Task:
        """Both at once."""
        best = self._leave(now)
        self._join(task, now)
        self._look()
        return best

    def _join(self, task: Task, now: float) -> None:
        line, index = task.line, task.job.index
        first = self._first.get(line)
        if first is not None:
            behind = self._behind.setdefault(line, [])
            if first[1] < index:
                heappush(behind, (index, task))
                return
            heappush(behind, first[1:])
        self._first[line] = rank_of(task.job, self._policy, now), index, task

    def _leave(self, now: float) -> Task:
        """Take out the best; the next in its line is ranked.

        Raises:
            DemandError: it ranks before the best.
        """
        assert self.best is not None
        best, _, task = self.best
        line = task.line
        behind = self._behind.get(line)
        if behind:
            index, following = heappop(behind)
            rank = rank_of(following.job, self._policy, now)
            if (rank,) < (best,):
                raise DemandError(
                    f"{self._policy!r} ranked job {index} {rank}, before the {best} of job "
                    f"{task.job.index}, which arrived earlier in the same line {line!r}; expected "
                    "the order of arrival within a line: have `line` give None"
                )
            self._first[line] = rank, index, following
        else:
            del self._first[line]
            self._behind.pop(line, None)
        return task

    def _look(self) -> None:
        first = self._first
        self.best = min(first.values()) if first else None
