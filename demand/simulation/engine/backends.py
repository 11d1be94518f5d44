"""The backends of a simulated engine, and the prewarming of what may follow."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast, final

from demand.arguments import check_instance
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.graph.pdgraph import PDGraph
from demand.prewarm.base import Prewarmer, Successor
from demand.prewarm.successors import backend_of, durations_of, successors_of
from demand.simulation.engine.agenda import Action, Agenda
from demand.simulation.engine.calls import call_groups
from demand.simulation.engine.job_on_engine import JobOnEngine
from demand.simulation.engine.pools import Pool, PoolReport
from demand.simulation.engine.warm_pool import PlaceOf, WarmPool
from demand.units import KINDS, CostModel, Execution, Unit
from demand.workloads.workload import Workload


@final
class Backends:
    """The pools of a simulation: gives their instances to units, and warms them by a prewarmer.

    Args:
        pools: by name of a unit, or by kind for all units of the kind.
        prewarmer: plans ahead.
        pace: seconds of a call on the engine, for the prewarmer.
        graphs: by application.
        agenda: of the simulation.
        place: order of jobs that wait for an instance.
    """

    def __init__(
        self,
        pools: Mapping[str, Pool],
        prewarmer: Prewarmer,
        pace: CostModel,
        graphs: Mapping[str, PDGraph],
        agenda: Agenda,
        place: PlaceOf,
    ) -> None:
        self._configured = pools
        self._pools = {name: WarmPool(pool, agenda, place) for name, pool in pools.items()}
        self._prewarmer = prewarmer
        self._pace = pace
        self._graphs = graphs
        self._held: dict[JobOnEngine, WarmPool] = {}
        self._known: dict[tuple[str, str], tuple[Distribution, list[tuple[Unit, Successor]]]] = {}

    def acquire(self, job: JobOnEngine, now: float, begin: Action) -> bool:
        """Whether the backend of the unit of `job` is warm; if not, `begin` is called later."""
        if not self._pools:
            return True
        unit = job.execution.unit
        pool = backend_of(self._pools, unit)
        if pool is None:
            return True
        self._held[job] = pool
        return pool.acquire(job, unit, now, begin)

    def waits_for_its_turn(self, job: JobOnEngine) -> bool:
        """Whether the backend of the present unit is to be warmed only when its turn has come."""
        if not self._pools or self._prewarmer.at_submission:
            return False
        return backend_of(self._pools, job.execution.unit) is not None

    def release(self, job: JobOnEngine, now: float) -> None:
        """The unit of `job` is over: free its instance, and what was warmed for units not taken."""
        if not self._pools:
            return
        job.alarms = []
        held = self._held.pop(job, None)
        following = job.run[job.position + 1].unit if job.position + 1 < len(job.run) else None
        next_pool = None if following is None else backend_of(self._pools, following)
        for pool in self._pools.values():
            needed = following if pool is next_pool else None
            if pool is held:
                pool.release(job, needed, now)
            if following is None:
                pool.depart(job, now)
            else:
                pool.lapse(job, needed, now)

    def plan(self, job: JobOnEngine, now: float) -> list[tuple[float, Action]]:
        """Plan for what may follow the unit of `job`, and start the warm-ups due at once.

        Returns:
            The other warm-ups: (seconds from the start of the unit, what to do), earliest first.
        """
        if not self._pools or self._prewarmer.knows == "nothing":
            return []
        remaining, successors = self._what_follows(job)
        later = []
        for pool in dict.fromkeys(backend_of(self._pools, unit) for unit, _ in successors):
            assert pool is not None
            own = {s.unit: u for u, s in successors if backend_of(self._pools, u) is pool}
            capacity = pool.free(now) * pool.pool.footprint
            offered = [s for _, s in successors if s.unit in own]
            for start in self._prewarmer.plan(remaining, offered, capacity):
                action = partial(self._prewarm, job, job.position, pool, own[start.unit])
                if start.seconds > 0.0:
                    later.append((start.seconds, action))
                else:
                    action(now)
        return sorted(later, key=_seconds)

    def alarms(self, job: JobOnEngine, later: Sequence[tuple[float, Action]]) -> None:
        """Set alarms to do `later` when the llm unit of `job` has come that far.

        Seconds of the unit are those of a call at the pace given, and how far it has come is what
        its calls have produced on average.
        """
        if not later:
            return
        calls = job.execution.parallelism
        given = sum(count * tokens for count, tokens, _ in call_groups(job.execution))
        prefill = given * self._pace.prefill_seconds_per_token
        rate = self._pace.decode_seconds_per_token
        for seconds, action in reversed(later):
            left = seconds * calls - prefill
            job.alarms.append((max(1, math.ceil(left / rate)) if rate else 1, action))

    def reports(self, now: float) -> dict[str, PoolReport]:
        """What became of each pool, at second `now`, the end of the simulation."""
        return {name: pool.report(now) for name, pool in self._pools.items()}

    def _prewarm(self, job: JobOnEngine, at: int, pool: WarmPool, unit: Unit, now: float) -> None:
        if job.position == at:
            pool.prewarm(job, unit, now)

    def _what_follows(self, job: JobOnEngine) -> tuple[Distribution, list[tuple[Unit, Successor]]]:
        """Seconds of the unit of `job`, and the units that may follow it and have a backend."""
        execution = job.execution
        if self._prewarmer.knows == "truth":
            seconds = self._pace.seconds(execution, "critical_path")
            return Distribution([seconds]), self._truth(
                job.run[job.position + 1 : job.position + 2]
            )
        key = job.application, execution.unit.name
        if key not in self._known:
            graph = self._graphs[key[0]]
            if execution.unit in graph.units:
                durations = durations_of(graph, key[1], self._pace)
                self._known[key] = durations, successors_of(graph, key[1], self._configured)
            else:  # never seen: nothing is known of what follows
                self._known[key] = Distribution([0.0]), []
        return self._known[key]

    def _truth(self, following: Sequence[Execution]) -> list[tuple[Unit, Successor]]:
        return [
            (e.unit, Successor(e.unit.name, 1.0, pool.warm_seconds, pool.footprint))
            for e in following
            if (pool := backend_of(self._configured, e.unit)) is not None
        ]


def checked_pools(backends: object) -> dict[str, Pool]:
    """The pools that a caller gives, by name.

    Raises:
        DemandError: no mapping, a name that is no text, or something that is no pool.
    """
    expected = 'pools by name of a unit or kind, such as {"container": Pool.containers(8, 5.0)}'
    check_instance("backends", backends, Mapping, expected)
    pools = dict(cast(Mapping[str, Pool], backends))
    for name, pool in pools.items():
        check_instance("a name in backends", name, str, "the name of a unit or kind")
        check_instance(f"backends[{name!r}]", pool, Pool, "a Pool, such as Pool.models(2, 4.0)")
    return pools


def check_pools(
    pools: Mapping[str, Pool],
    prewarmer: Prewarmer,
    workload: Workload,
    runs: Sequence[Sequence[Execution]],
) -> None:
    """Raise `DemandError` for a pool of no unit, or an application to plan for without a graph."""
    names = set(pools) - set(KINDS)
    unknown = names - {e.unit.name for run in runs for e in run} if names else names
    if unknown:
        raise DemandError(
            f"there are pools for {sorted(unknown)}, which no job executes; expected names of "
            f"units or kinds ({', '.join(KINDS)})"
        )
    without = sorted(set(workload.applications) - set(workload.graphs))
    if pools and prewarmer.knows == "graph" and without:
        raise DemandError(
            f"applications {without} have no graph for {prewarmer!r} to plan by; give "
            "Workload(graphs=...), or NoPrewarm()"
        )


def _seconds(item: tuple[float, Action]) -> float:
    return item[0]
