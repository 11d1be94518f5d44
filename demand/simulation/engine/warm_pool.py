"""A pool at work: which instances are warm, who uses them, and who waits."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import final

from demand.policies.base import Rank
from demand.simulation.engine.agenda import Action, Agenda
from demand.simulation.engine.job_on_engine import JobOnEngine
from demand.simulation.engine.pools import Pool, PoolReport
from demand.units import Unit

Key = int | str
"""Who can use an instance: the index of a job, or the name of an application or a unit."""

PlaceOf = Callable[[JobOnEngine, float], tuple[Rank, int]]


@dataclass(slots=True, eq=False)
class _Instance:
    key: Key
    started: float  # second at which its warm-up began
    ready: float  # second at which it ends
    users: int = 0
    used: bool = False
    reserved: set[JobOnEngine] = field(default_factory=set)
    idle_since: float = 0.0

    def idle(self, now: float) -> bool:
        return not self.users and self.ready <= now


@dataclass(slots=True, eq=False)
class _Claim:
    job: JobOnEngine
    key: Key
    since: float  # second from which on its unit waits
    begin: Action


@final
class WarmPool:
    """The instances of one pool, and the units that wait for one.

    Args:
        pool: what it can hold.
        agenda: of the simulation; told when a warm-up ends and when an idle instance expires.
        place: rank and order of arrival of a job, by which waiting units are served.
    """

    def __init__(self, pool: Pool, agenda: Agenda, place: PlaceOf) -> None:
        self.pool = pool
        self._agenda = agenda
        self._place = place
        self._instances: list[_Instance] = []
        self._held: dict[JobOnEngine, _Instance] = {}
        self._claims: list[_Claim] = []
        self._counts = {"warm": 0, "late": 0, "cold": 0, "unused": 0}
        self._wait = self._idle = self._unused = 0.0

    def acquire(self, job: JobOnEngine, unit: Unit, now: float, begin: Action) -> bool:
        """Give `job` an instance for `unit`.

        Returns:
            Whether one is warm now; if not, `begin` is called once it is.
        """
        self._claims.append(_Claim(job, self._key(job, unit), now, begin))
        return self._serve(now, newcomer=job)

    def release(self, job: JobOnEngine, following: Unit | None, now: float) -> None:
        """The unit of `job` is over; its instance stays if the unit `following` can use it."""
        instance = self._held.pop(job)
        instance.users -= 1
        if not instance.users:
            instance.idle_since = now
        if following is not None and instance.key == self._key(job, following):
            instance.reserved.add(job)
        self._rest(instance, now)
        self._serve(now)

    def prewarm(self, job: JobOnEngine, unit: Unit, now: float) -> None:
        """Have an instance warm for `job` ahead of time, if there is a slot; kept until `lapse`."""
        key = self._key(job, unit)
        instance = self._usable(job, key, now)
        if instance is None:
            instance = self._start(key, now, demanded=False)
            if instance is None:
                return
            self._agenda.add(instance.ready, self._serve_those_waiting)
        instance.reserved.add(job)

    def lapse(self, job: JobOnEngine, following: Unit | None, now: float) -> None:
        """Give up what was reserved for `job`, but for what the unit `following` can use."""
        key = self._key(job, following) if following is not None else None
        freed = False
        for instance in [i for i in self._instances if job in i.reserved and i.key != key]:
            instance.reserved.remove(job)
            self._rest(instance, now)
            freed = True
        if freed:
            self._serve(now)

    def depart(self, job: JobOnEngine, now: float) -> None:
        """The job is over: give up what was reserved for it, and end what only it could use."""
        self.lapse(job, None, now)
        if self.pool.scope == "job":
            for instance in [i for i in self._instances if i.key == job.index]:
                self._remove(instance, now)
            self._serve(now)

    def free(self, now: float) -> int:
        """How many slots a warm-up ahead of time could take."""
        pool = self.pool
        return pool.slots - sum(bool(i.reserved) or not i.idle(now) for i in self._instances)

    def report(self, now: float) -> PoolReport:
        """What became of the pool, at second `now`, the end of the simulation."""
        for instance in list(self._instances):
            self._remove(instance, now)
        counts = self._counts
        uses = counts["warm"] + counts["late"] + counts["cold"]
        return PoolReport(
            uses,
            counts["warm"],
            counts["late"],
            counts["cold"],
            self._wait,
            self._idle,
            counts["unused"],
            self._unused,
        )

    def _serve(self, now: float, newcomer: JobOnEngine | None = None) -> bool:
        """Give instances to the units that wait, best rank first, until one finds no slot.

        Those whose instance is warm begin, but for that of `newcomer`.

        Returns:
            Whether the unit of `newcomer` can begin.
        """
        at_once = False
        while self._claims:
            claim = min(self._claims, key=lambda claim: self._place(claim.job, now))
            ready = self._give(claim, now)
            if ready == math.inf:
                break
            self._claims.remove(claim)
            if ready > now:
                self._agenda.add(ready, claim.begin)
            elif claim.job is newcomer:
                at_once = True
            else:
                claim.begin(now)
        return at_once

    def _give(self, claim: _Claim, now: float) -> float:
        """Give `claim` an instance.

        Returns:
            The second at which it is warm; infinity if there is no slot for one.
        """
        job = claim.job
        instance, how = self._usable(job, claim.key, now), "cold"
        if instance is None:
            instance = self._start(claim.key, now, demanded=True)
            if instance is None:
                return math.inf
        else:
            how = "warm" if instance.ready <= now else "late"
        self._counts[how] += 1
        self._count_idle(instance, now)
        instance.reserved.discard(job)
        instance.users += 1
        instance.used = True
        self._held[job] = instance
        ready = max(now, instance.ready)
        self._wait += ready - claim.since
        return ready

    def _serve_those_waiting(self, now: float) -> None:
        self._serve(now)

    def _usable(self, job: JobOnEngine, key: Key, now: float) -> _Instance | None:
        """An instance of `key` that `job` may have: its own, else the one warm soonest."""
        found = [
            i
            for i in self._instances
            if i.key == key and (self.pool.shared or (not i.users and i.reserved <= {job}))
        ]
        return min(found, key=lambda i: (job not in i.reserved, i.ready), default=None)

    def _start(self, key: Key, now: float, demanded: bool) -> _Instance | None:
        if len(self._instances) == self.pool.slots:
            idle = [i for i in self._instances if i.idle(now) and (demanded or not i.reserved)]
            if not idle:
                return None
            self._remove(min(idle, key=lambda i: (bool(i.reserved), i.idle_since)), now)
        instance = _Instance(key, now, now + self.pool.warm_seconds, idle_since=now)
        self._instances.append(instance)
        return instance

    def _rest(self, instance: _Instance, now: float) -> None:
        """If nobody uses or awaits it, keep it as long as the pool does."""
        if instance.users or instance.reserved:
            return
        self._count_idle(instance, now)
        keep = self.pool.keep_seconds
        if keep == 0.0:
            self._remove(instance, now)
        elif keep < math.inf:
            expire = partial(self._expire, instance, now)
            self._agenda.add(max(now, instance.ready) + keep, expire)

    def _expire(self, instance: _Instance, idle_since: float, now: float) -> None:
        unused = not instance.users and not instance.reserved and instance in self._instances
        if unused and instance.idle_since == idle_since:
            self._remove(instance, now)
            self._serve(now)

    def _remove(self, instance: _Instance, now: float) -> None:
        self._instances.remove(instance)
        self._count_idle(instance, now)
        if not instance.used:
            self._counts["unused"] += 1
            self._unused += min(now, instance.ready) - instance.started

    def _count_idle(self, instance: _Instance, now: float) -> None:
        if instance.idle(now):
            self._idle += now - max(instance.idle_since, instance.ready)
        if not instance.users:
            instance.idle_since = now

    def _key(self, job: JobOnEngine, unit: Unit) -> Key:
        if self.pool.scope == "job":
            return job.index
        return job.application if self.pool.scope == "application" else unit.name
