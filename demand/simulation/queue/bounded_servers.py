"""Several servers, of which few running jobs are ranked when another arrives or leaves."""

from operator import attrgetter
from typing import final

from demand.policies.base import Policy
from demand.policies.exact_thresholds import half_way, just_below
from demand.simulation.queue.job_in_service import Task
from demand.simulation.queue.servers import Servers
from demand.simulation.queue.waiting import WaitingPlace


def servers_for(policy: Policy, servers: int) -> Servers:
    """Servers for jobs ranked by `policy`.

    Bounds pay with several servers, and hold where serving one job leaves the others' ranks alone.
    """
    return (BoundedServers if servers > 1 and not policy.reranks else Servers)(policy, servers)


@final
class BoundedServers(Servers):
    """Serves the same jobs as `Servers`.

    A running task has a bound on its place, half-way to the best one waiting, so that only those
    are ranked whose bounds come after whoever wants a server. A task that reached its bound is
    looked at next where its rank rises over the best one waiting.
    """

    def look(self, task: Task, now: float) -> bool:
        """Look at a running task that reached its stop before the end of a unit.

        Returns:
            Whether that is an event; half-way it is none, unless the rank rose over the best.
        """
        self.settled = False
        self._rank(task, now)
        best = self._waiting.best
        event = not task.half_way or (best is not None and task.place > best)
        task.half_way = event  # after a look half-way the next is at the best one waiting
        return event

    def end_unit(self, task: Task) -> None:
        """Take note that a unit of a running task has ended, which may change its rank."""
        self.settled = False
        task.bound = None

    def _start(self, task: Task, now: float) -> None:
        super()._start(task, now)
        task.bound = None
        task.half_way = True

    def _settle(self, now: float) -> None:
        waiting, running = self._waiting, self.running
        self.settled = True
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
        for task in running:
            if task.bound is None or task.bound is task.place:
                self._watch(task, now)

    def _last_after(self, place: WaitingPlace, now: float) -> Task | None:
        """The last of the running tasks, if it comes after `place`; all that may are ranked."""
        tasks = [
            task
            for task in self.running
            if task.bound is None or task.bound > place or task.bound_until <= now
        ]
        for task in tasks:
            if task.bound is None or (task.bound_until <= now and task.bound is not task.place):
                self._rank(task, now)
        if len(tasks) > 1:
            tasks.sort(key=_bound, reverse=True)
        last = None
        for task in tasks:
            if last is not None and _bound(task) < last.place:
                break
            if task.bound is not task.place:
                self._rank(task, now)
                task.half_way = True
            if task.place > (place if last is None else last.place):
                last = task
        return last

    def _watch(self, task: Task, now: float) -> None:
        best = self._waiting.best
        if best is None:
            self._stop(task, None)
            task.bound = None
            return
        if task.bound is not task.place:
            self._rank(task, now)
        place, threshold = task.place, best[0]
        if task.half_way:
            threshold = half_way(place[0], threshold)
        if place[1] > best[1] and threshold == best[0]:
            threshold = just_below(threshold)
        self._stop(task, threshold)
        # A rank that is worse since it is served may be beyond the best already.
        task.bound = (threshold, place[1]) if place < best else None
        # Sooner than the stop: quanta are counted with a slack (`policies.quanta`).
        task.bound_until = task.stop - 1e-9 * task.stop_age


_bound = attrgetter("bound")
