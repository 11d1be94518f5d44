"""Who is served: the best ranked of the jobs present, and until when that surely stays so."""

from collections.abc import Hashable, Sequence
from operator import attrgetter

from demand.errors import DemandError
from demand.policies.base import Policy, Rank, rank_of
from demand.policies.exact_thresholds import just_below
from demand.policies.wrapper import hook
from demand.simulation.queue.job_in_service import JobInService
from demand.simulation.queue.waiting import Heap, Lines, WaitingJobs


class Servers:
    """Serves the jobs of least (rank, order of arrival), one on each server.

    Each running job has a stop: the end of a unit, or where its rank rises over that of the best
    job waiting. Should that one leave, the stop comes too early and changes nothing. Where the
    order of running and waiting jobs may have changed, all running jobs are ranked.

    Attributes:
        running: jobs being served, in the order in which they were put there.
        in_order: whether no waiting job goes before a running one; to be set to False where the
            rank of a running one may have risen.
        preemptions: times a running job was put back to wait.
    """

    def __init__(self, policy: Policy, servers: int) -> None:
        self.running: list[JobInService] = []
        self.in_order = True
        self.preemptions = 0
        self._policy = policy
        self._served = hook(policy, "served")
        self._servers = servers
        self._arrived: list[JobInService] = []
        self._served_lines: set[Hashable] = set()
        self._lines = Lines(policy) if policy.reranks else None
        self._waiting: WaitingJobs = Heap(policy) if self._lines is None else self._lines

    def add(self, job: JobInService) -> None:
        """Take in a job that has arrived; `decide` ranks it."""
        if self._lines is not None:
            self._lines.assign(job)
        self._arrived.append(job)

    def serve(self, stopped: Sequence[JobInService], now: float) -> None:
        """Count the service up to second `now` of the running jobs that reached their stop.

        Unless the policy reranks, that of the others is counted when they are next ranked.
        """
        if self._lines is not None:
            stopped = self.running
            for job in stopped:
                self._served_lines.add(job.line_key)
        for job in stopped:
            self._count_service(job, now)

    def stop_within_unit(self, job: JobInService, now: float) -> bool:
        """A running job reached its stop, and that is not the end of a unit.

        Returns:
            Whether that is an event.
        """
        self.in_order = False
        return True

    def end_unit(self, job: JobInService) -> None:
        """A unit of a running job has ended, which may change its rank."""
        self.in_order = False

    def leave(self, job: JobInService) -> None:
        """Take out a running job that has finished."""
        job.running = False
        self.running.remove(job)

    def decide(self, now: float) -> None:
        """Serve those that go first, once all that happens at second `now` has happened."""
        waiting, running = self._waiting, self.running
        if self._lines is not None:
            self._lines.rerank(self._served_lines, now)
            self._served_lines.clear()
            self.in_order = False
        if self._arrived:
            for job in self._arrived:
                if waiting.best is None and len(running) + len(self._arrived) <= self._servers:
                    self._start(job, now)
                    self._set_stop(job, now)
                    continue
                waiting.add(job, now)
                best = waiting.best
                if best is not None and best[2] is job:  # behind another, it changes nothing yet
                    self.in_order = False
            self._arrived.clear()
        while len(running) < self._servers and waiting.best is not None:
            job = waiting.take(now)
            self._start(job, now)
            if self.in_order:
                self._set_stop(job, now)
        if not self.in_order:
            self._put_in_order(now)

    def _start(self, job: JobInService, now: float) -> None:
        job.running = True
        job.started_at = job.attained_service
        job.since = now
        self.running.append(job)

    def _put_in_order(self, now: float) -> None:
        """Serve waiting jobs that go before running ones in their stead."""
        waiting, running = self._waiting, self.running
        self.in_order = True
        if waiting.best is not None:
            for job in running:
                self._rank(job, now)
            for _ in range(len(running)):
                worst = running[0] if self._servers == 1 else max(running, key=_place)
                if worst.place < waiting.best:
                    break
                best = self._swap(worst, now)
                if self._servers > 1:
                    self._rank(best, now)
        for job in running:
            self._set_stop(job, now)

    def _swap(self, worst: JobInService, now: float) -> JobInService:
        """Serve the best that waits in the stead of `worst`, which waits from now on."""
        self.preemptions += 1
        self.running.remove(worst)
        worst.running = False
        best = self._waiting.swap(worst, now)
        self._start(best, now)
        return best

    def _rank(self, job: JobInService, now: float) -> None:
        """Rank a running job as of second `now`."""
        if job.since < now:
            self._count_service(job, now)
        job.place = job.bound = rank_of(job, self._policy, now), job.index
        job.exact = True

    def _set_stop(self, job: JobInService, now: float) -> None:
        """Let a running job stop where a unit ends, or its rank exceeds that of the best waiting.

        At equal rank the earlier arrival goes first.
        """
        best = self._waiting.best
        if best is None:
            self._stop_above(job, None)
        else:
            self._stop_above(job, best[0] if job.index < best[1] else just_below(best[0]))

    def _stop_above(self, job: JobInService, threshold: Rank | None) -> None:
        """Let a running job stop where a unit ends, or its rank exceeds `threshold`."""
        attained = job.attained_service
        stop = job.ends[job.units_finished]
        if threshold is not None:
            above = self._policy.next_above(job, threshold)
            if above < stop:
                stop = above
            if not above > attained:
                raise DemandError(
                    f"{self._policy!r}.next_above gave {above} for job {job.index}, which has "
                    f"attained {attained} and goes first; expected a later age"
                )
        job.stop_attained = stop
        job.stop = job.since + (stop - attained)

    def _count_service(self, job: JobInService, now: float) -> None:
        """Count what a running job attained by second `now`; at its stop, exactly what was set."""
        before, attained = job.attained_service, job.stop_attained
        if now < job.stop:
            reached = before + (now - job.since)
            if reached < attained:
                attained = reached
        job.attained_service = attained
        job.since = now
        if self._served is not None:
            self._served(job, attained - before, now)


_place = attrgetter("place")
