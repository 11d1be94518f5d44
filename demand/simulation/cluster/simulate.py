"""Applications on several engines behind a router, simulated from event to event."""

import math
from collections.abc import Callable, Mapping
from typing import Any, final

from demand.arguments import check_instance, renamed_keyword, whole_number
from demand.errors import DemandError
from demand.policies.base import Policy
from demand.prewarm.base import Prewarmer
from demand.progress_bar import bar
from demand.refine.base import Estimator
from demand.refine.predictor import Predictor
from demand.routing.base import ReadyUnit, Router
from demand.routing.least_loaded import LeastLoaded
from demand.simulation.cluster.result import ClusterResult
from demand.simulation.cluster.routed_engine import RoutedEngine
from demand.simulation.engine.applications import Applications
from demand.simulation.engine.engine import Engine
from demand.simulation.engine.engine_at_work import EngineAtWork
from demand.simulation.engine.job_on_engine import JobOnEngine
from demand.simulation.engine.pools import Pool
from demand.simulation.engine.prefix_cache import LastCalls, PrefixCache
from demand.units import CostModel, is_sequence
from demand.workloads.closed_loop import ClosedLoop
from demand.workloads.workload import Workload


@renamed_keyword("service_cost", "cost")
def simulate_cluster(
    workload: Workload | ClosedLoop,
    policy: Policy,
    engine: Engine | None = None,
    engines: int = 4,
    router: Router | None = None,
    *,
    backends: Mapping[str, Pool] | None = None,
    prewarm: Prewarmer | None = None,
    pace: CostModel | None = None,
    estimator: Estimator | None = None,
    predictor: Predictor | None = None,
    cost: CostModel | None = None,
    seed: int = 0,
    progress: bool = False,
) -> ClusterResult:
    """Serve the runs of `workload` on several engines alike, each unit where `router` says.

    Every engine is one of `simulate_engine`: it forms its batches by `policy`, by the rules of
    `Engine`, and its steps take their own time. An llm unit is routed when the run comes to it; all
    of its calls go to one engine, and stay. What the policy remembers (`Policy.new_state`) is one
    for all engines, and so are the backends. What a call leaves behind is found on the engine that
    served it alone. There it can be found later, too, when calls of the run were served elsewhere
    in between: as far as all of these shared their prompts. It is not held any longer
    (`Retention.holds`).

    Of one moment, what happens outside of the engines goes first, then steps end, then batches are
    formed, each by number of the engine; what follows from one of these at the same moment goes by
    the same order. So a router sees an engine whose step ends at that very moment with the step
    under way, unless its number is smaller.

    With one engine all is as by `simulate_engine`, to the last bit, whatever the router.

    Args:
        workload: with `runs`; the result of a closed loop has the jobs as they arrived.
        policy: ranks the jobs on each engine.
        engine: limits and times of each engine; `None` for the defaults.
        engines: how many there are.
        router: chooses among them; `None` for `LeastLoaded()`.
        backends: as `simulate_engine`; those of all engines together: what is warm for one is warm
            for all, also a prefix or an adapter, which real engines hold each for itself.
        prewarm: as `simulate_engine`.
        pace: as `simulate_engine`.
        estimator: as `simulate_engine`.
        predictor: as `simulate_engine`.
        cost: as `simulate_engine`.
        seed: of the number each job draws (`Job.lottery`). Routers have seeds of their own.
        progress: whether to show a bar, where tqdm is installed.

    Raises:
        DemandError: as `simulate_engine`; engines that are not a whole number of at least 1, what
            is no router, or one that chooses an engine that is not there.
    """
    count = _count(engines)
    router = LeastLoaded() if router is None else router
    check_instance("router", router, Router, "a router, such as PrefixAffinity(bound=16)")
    simulation = _Cluster(
        count,
        router,
        workload,
        policy,
        engine,
        backends=backends,
        prewarm=prewarm,
        pace=pace,
        estimator=estimator,
        predictor=predictor,
        cost=cost,
        seed=seed,
    )
    with bar(len(workload), "jobs", progress) as simulation.advance_bar:
        return simulation.run()


def _count(engines: object) -> int:
    try:
        return whole_number("engines", engines, least=1)
    except DemandError as error:
        raise DemandError(f"{error}: give engines=4, say, each of them of Engine(...)") from None


@final
class _Cluster(Applications):
    advance_bar: Callable[[], Any]

    def __init__(self, count: int, router: Router, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for index, run in enumerate(self.runs):
            if not is_sequence(run):
                raise DemandError(
                    f"the run of job {index} has units side by side (after=...), and a job here is "
                    "on one engine at a time; give the run with after=None, or simulate_engine"
                )
        self.router = router
        self.state = router.new_state(count)
        self.ended: LastCalls = {}
        self.works = [
            EngineAtWork(self.engine, self.policy, self.new_cache()) for _ in range(count)
        ]
        self.routed = [RoutedEngine(number, work) for number, work in enumerate(self.works)]
        self.at: dict[JobOnEngine, int] = {}  # number of the engine of its last llm unit
        self.moves = 0

    def new_cache(self) -> PrefixCache | None:
        return None if self.tables is None else PrefixCache(self.engine, self.tables, self.ended)

    def run(self) -> ClusterResult:
        now, works, count = 0.0, self.works, len(self.workload)
        while self.finished < count:
            ends = [work.end for work in works]
            end, upcoming = min(ends), self.next_second()
            if upcoming <= now:
                self.happen(now)
            elif end <= now:
                work = works[ends.index(end)]
                self.end_steps(work, work.end_steps(), now)
            elif (ready := self.ready()) is not None:
                self.form(ready, now)
            else:
                now = min(end, upcoming)
                assert now < math.inf, "jobs are left, and nothing is left to happen"
        return self.result(now)

    def ready(self) -> EngineAtWork | None:
        """The first engine that has jobs and no step under way."""
        for work in self.works:
            if work.end == math.inf and work.order:
                return work
        return None

    def form(self, work: EngineAtWork, now: float) -> None:
        if work.form(now, self.warm):
            # Something may come from another engine at any time: the steps are cut then. Where
            # there is no other it can only come from outside, and is waited for like a single
            # engine does, so that sums over steps are rounded alike.
            work.begin(now, self.next_second() if len(self.works) == 1 else math.inf)

    def arrived(self, job: JobOnEngine) -> None:
        pass

    def reached(self, job: JobOnEngine, now: float) -> None:
        last = self.at.get(job)
        tokens = sum(calls.count * calls.input_tokens for calls in job.calls)
        unit = ReadyUnit(job, job.execution, now, job.requests, tokens, last)
        for engine in self.routed:
            engine.now = now
        number = self.at[job] = self.chosen(unit)
        self.moves += last is not None and last != number
        self.routed[number].route(unit)
        for engine in self.routed:
            if engine.number == number:
                engine.ask(job)
            else:
                engine.ask_elsewhere(job)

    def chosen(self, unit: ReadyUnit) -> int:
        """Number of the engine that the router chooses for `unit`."""
        chosen, count = self.router.choose(unit, self.routed, self.state), len(self.routed)
        try:
            number = whole_number("the engine", chosen, least=0)
        except DemandError:
            number = count
        if number < count:
            return number
        raise DemandError(
            f"{self.router!r} chose engine {chosen!r:.200} for unit {unit.execution.unit.name!r} "
            f"of job {unit.job.index}; expected a whole number from 0 to {count - 1}: have "
            "`choose` return the `number` of one of the engines that it is given"
        )

    def submit(self, job: JobOnEngine, now: float) -> None:
        work = self.works[self.at[job]]
        work.cut(now)
        work.batcher.add(job, now)

    def departed(self, job: JobOnEngine, now: float) -> None:
        for engine in self.routed:
            engine.end(job, now)
        self.ended.pop(job.index, None)
        self.at.pop(job, None)
        self.router.departed(job, self.state)
        self.advance_bar()

    def result(self, now: float) -> ClusterResult:
        workload = self.served()
        return ClusterResult(
            self.policy,
            workload,
            self.completion_times,
            self.events(self.works),
            sum(work.batcher.preemptions for work in self.works),
            self.engine,
            self.router,
            tuple(engine.share(workload) for engine in self.routed),
            self.moves,
            self.backends.reports(now),
        )
