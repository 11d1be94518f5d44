"""Several servers, of which few running jobs are ranked when another arrives or leaves."""

from typing import final

from demand.policies.base import Policy
from demand.policies.exact_thresholds import ROUNDING
from demand.simulation.bounded_ranks import BoundedRanks, threshold
from demand.simulation.queue.job_in_service import JobInService
from demand.simulation.queue.servers import Servers
from demand.simulation.queue.waiting import RankedJob


def servers_for(policy: Policy, servers: int) -> Servers:
    """Servers for jobs ranked by `policy`.

    Bounds pay with several servers, and hold where serving one job leaves the others' ranks alone.
    """
    return (BoundedServers if servers > 1 and not policy.reranks else Servers)(policy, servers)


@final
class BoundedServers(Servers):
    """Serves the same jobs as `Servers`, and ranks only those whose bounds do not tell.

    A running job stops where its bound ends (`BoundedRanks`), half-way to the best job waiting. It
    is then ranked, and stops next where its rank rises over that of the best job waiting.
    """

    def __init__(self, policy: Policy, servers: int) -> None:
        super().__init__(policy, servers)
        self._ranks = BoundedRanks(self._rank_and_go_halfway)

    def stop_within_unit(self, job: JobInService, now: float) -> bool:
        """A running job reached its stop, and that is not the end of a unit.

        Returns:
            Whether that is an event; half-way it is none, unless the rank rose over the best.
        """
        self.in_order = False
        self._rank(job, now)
        best = self._waiting.best
        event = not job.halfway or (best is not None and job.place > best)
        job.halfway = event  # after a stop half-way the next is at the best one waiting
        return event

    def end_unit(self, job: JobInService) -> None:
        """A unit of a running job has ended, which may change its rank."""
        self.in_order = job.exact = False
        job.bound = None

    def _start(self, job: JobInService, now: float) -> None:
        super()._start(job, now)
        job.bound = None
        job.exact = False
        job.halfway = True

    def _put_in_order(self, now: float) -> None:
        waiting, running = self._waiting, self.running
        self.in_order = True
        for _ in range(len(running)):
            if waiting.best is None:
                break
            worst = self._last_after(waiting.best, now)
            if worst is None:
                break
            best = self._swap(worst, now)
            self._rank(best, now)
            place = waiting.best
            assert place is not None
            if worst.place < place and best.place < place:
                break  # all others came before `worst`
        for job in running:
            if job.exact or job.bound is None:
                self._set_stop(job, now)

    def _last_after(self, place: RankedJob, now: float) -> JobInService | None:
        """The last of the running jobs, if it goes after `place`."""
        candidates = [
            job
            for job in self.running
            if job.bound is None or job.bound > place or job.bound_until <= now
        ]
        if not candidates:
            return None
        for job in candidates:
            if job.bound is None or (job.bound_until <= now and not job.exact):
                self._rank(job, now)
        return self._ranks.last_after(candidates, place, now)

    def _rank_and_go_halfway(self, job: JobInService, now: float) -> None:
        """Rank a job whose bound did not tell: its next one lies half-way again."""
        self._rank(job, now)
        job.halfway = True

    def _set_stop(self, job: JobInService, now: float) -> None:
        best = self._waiting.best
        if best is None:
            self._stop_above(job, None)
            job.bound, job.exact = None, False
            return
        if not job.exact:
            self._rank(job, now)
        rank, index = place = job.place
        highest = threshold(rank, index, best[0], best[1], job.halfway)
        self._stop_above(job, highest)
        # A rank that is worse since it is served may be beyond the best already.
        job.bound = (highest, index) if place < best else None
        job.exact = False
        # Sooner than the stop: quanta may end a rounding sooner (`Policy.next_above`).
        job.bound_until = job.stop - ROUNDING * job.stop_attained
