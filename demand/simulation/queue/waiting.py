"""The jobs that wait for a server, best first."""

from collections.abc import Hashable, Iterable
from heapq import heappop, heappush, heapreplace
from typing import Protocol, final

from demand.errors import DemandError
from demand.policies.base import Policy, Rank, rank_of
from demand.simulation.queue.job_in_service import JobInService

RankedJob = tuple[Rank, int, JobInService]
"""The place of a waiting job (rank, order of arrival), and the job itself."""


class WaitingJobs(Protocol):
    """The jobs that wait, in the order of service.

    Attributes:
        best: the one that goes first, with its place; None if none waits.
    """

    best: RankedJob | None

    def add(self, job: JobInService, now: float) -> None:
        """Rank `job` as of second `now`, and let it wait."""

    def take(self, now: float) -> JobInService:
        """Take out the best."""

    def swap(self, job: JobInService, now: float) -> JobInService:
        """Take out the best and let `job` wait in its stead."""


@final
class Heap:
    """Waiting jobs whose ranks stand still: adding and taking out is O(log n)."""

    __slots__ = ("_heap", "_policy", "best")

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: list[RankedJob] = []
        self.best: RankedJob | None = None

    def add(self, job: JobInService, now: float) -> None:
        """Rank `job` as of second `now`, and let it wait."""
        heap = self._heap
        heappush(heap, (rank_of(job, self._policy, now), job.index, job))
        self.best = heap[0]

    def take(self, now: float) -> JobInService:
        """Take out the best."""
        heap = self._heap
        job = heappop(heap)[2]
        self.best = heap[0] if heap else None
        return job

    def swap(self, job: JobInService, now: float) -> JobInService:
        """Take out the best and let `job` wait in its stead, in one pass through the heap."""
        heap = self._heap
        best = heapreplace(heap, (rank_of(job, self._policy, now), job.index, job))
        self.best = heap[0]
        return best[2]


@final
class Lines:
    """Waiting jobs of a policy that `reranks`, in lines that keep their order (`Policy.line`).

    Only the first of each line is ranked, and anew only when its line may have moved: one of which
    a job was served, or any line at all as soon as some job has no key.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._first: dict[Hashable, RankedJob] = {}
        self._behind: dict[Hashable, list[tuple[int, JobInService]]] = {}
        self._all_have_keys = True  # so that it is known whose ranks move
        self.best: RankedJob | None = None

    def assign(self, job: JobInService) -> None:
        """Give a job that has arrived its line; where the policy names none, one of its own."""
        key = self._policy.line(job)
        self._all_have_keys = self._all_have_keys and key is not None
        job.line_key = job if key is None else key

    def rerank(self, moved: Iterable[Hashable], now: float) -> None:
        """Rank anew, now that jobs of the lines `moved` were served."""
        first = self._first
        for key in moved if self._all_have_keys else first:
            if key in first:
                _, index, job = first[key]
                first[key] = rank_of(job, self._policy, now), index, job
        self._find_best()

    def add(self, job: JobInService, now: float) -> None:
        """Let `job` wait in its line; it is ranked if it is the first there."""
        self._join(job, now)
        self._find_best()

    def take(self, now: float) -> JobInService:
        """Take out the best; the next in its line is ranked as of second `now`."""
        job = self._leave(now)
        self._find_best()
        return job

    def swap(self, job: JobInService, now: float) -> JobInService:
        """Take out the best and let `job` wait in its stead."""
        best = self._leave(now)
        self._join(job, now)
        self._find_best()
        return best

    def _join(self, job: JobInService, now: float) -> None:
        key, index = job.line_key, job.index
        first = self._first.get(key)
        if first is not None:
            behind = self._behind.setdefault(key, [])
            if first[1] < index:
                heappush(behind, (index, job))
                return
            heappush(behind, first[1:])
        self._first[key] = rank_of(job, self._policy, now), index, job

    def _leave(self, now: float) -> JobInService:
        """Take out the best; the next in its line is ranked.

        Raises:
            DemandError: it ranks before the best.
        """
        assert self.best is not None
        best, _, job = self.best
        key = job.line_key
        behind = self._behind.get(key)
        if behind:
            index, following = heappop(behind)
            rank = rank_of(following, self._policy, now)
            if (rank,) < (best,):
                raise DemandError(
                    f"{self._policy!r} ranked job {index} {rank}, before the {best} of job "
                    f"{job.index}, which arrived earlier in the same line {key!r}; expected "
                    "the order of arrival within a line: have `line` give None"
                )
            self._first[key] = rank, index, following
        else:
            del self._first[key]
            self._behind.pop(key, None)
        return job

    def _find_best(self) -> None:
        first = self._first
        self.best = min(first.values()) if first else None
