"""The jobs of a workload as they execute their runs, whatever serves the requests of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from demand.arguments import check_instance
from demand.errors import DemandError
from demand.policies.base import Policy, Rank, check_policy, rank_of
from demand.prewarm.base import Prewarmer, check_prewarmer
from demand.prewarm.baselines import NoPrewarm
from demand.refine.base import Estimator
from demand.refine.predictor import Predictor
from demand.simulation.arrivals import arrivals_of, entries_of
from demand.simulation.engine.agenda import Action, Agenda
from demand.simulation.engine.backends import Backends, check_pools, checked_pools
from demand.simulation.engine.calls import (
    call_groups,
    check_run,
    execution_seconds,
    shared_tokens,
)
from demand.simulation.engine.engine import Engine
from demand.simulation.engine.engine_at_work import EngineAtWork
from demand.simulation.engine.job_on_engine import Calls, JobOnEngine
from demand.simulation.engine.pools import Pool
from demand.simulation.engine.retention import Tables
from demand.simulation.engine.waits import check_side_by_side
from demand.simulation.job_maker import JobMaker
from demand.simulation.refining import (
    ask_estimator,
    ask_predictor,
    check_estimator,
    check_predictor,
)
from demand.stages import progress_after
from demand.units import CostModel, Execution
from demand.workloads.closed_loop import ClosedLoop
from demand.workloads.workload import Workload


class Applications(ABC):
    """The jobs of a workload: their arrivals, their units, and what happens outside of engines.

    Arguments are those of `simulate_engine`, and refused as there.

    Attributes:
        engine: limits and times of what serves requests.
        tables: what its retention knows of each unit; `None` where it has none.
        entries: positions in the workload, in order of arrival.
        finished: jobs that are over.
        requests: that were asked for.
        alarms: that went off within llm units.
    """

    def __init__(
        self,
        workload: Workload | ClosedLoop,
        policy: Policy,
        engine: Engine | None,
        *,
        backends: Mapping[str, Pool] | None,
        prewarm: Prewarmer | None,
        pace: CostModel | None,
        estimator: Estimator | None,
        predictor: Predictor | None,
        cost: CostModel | None,
        seed: int,
    ) -> None:
        entries = entries_of(workload)
        check_policy("policy", policy)
        if entries.runs is None:
            raise DemandError(
                "the workload has no runs, and an engine serves requests, not seconds; give "
                "Workload(runs=...), the executions of each job"
            )
        check_estimator(estimator, entries)
        check_predictor(predictor, entries)
        engine = Engine() if engine is None else engine
        prewarm = NoPrewarm() if prewarm is None else prewarm
        check_instance("engine", engine, Engine, "an engine, such as Engine(max_requests=64)")
        check_prewarmer("prewarm", prewarm)
        for name, model in (("pace", pace), ("cost", cost)):
            if model is not None:
                check_instance(name, model, CostModel, "a CostModel, or None")
        pools = {} if backends is None else checked_pools(backends)
        for entry, run in enumerate(entries.runs):
            check_run(entry, run, engine)
            check_side_by_side(entry, run, engine, bool(pools))
        check_pools(pools, prewarm, entries, entries.runs)
        self.workload = workload
        self.runs = entries.runs
        self.policy = policy
        self.engine = engine
        self.costs = {name: cost or _cost(entries, name) for name in entries.distributions}
        self.tables: Tables | None = None
        if engine.retention is not None:
            self.tables = Tables(engine.retention, entries.graphs, self.costs)
        self.estimator, self.predictor = estimator, predictor
        self.arrivals = arrivals_of(workload)
        self.jobs = JobMaker(entries, policy, JobOnEngine, seed)
        self.agenda = Agenda()
        pace = pace or cost or CostModel()
        self.backends = Backends(pools, prewarm, pace, entries.graphs, self.agenda, self.place)
        self.entries: list[int] = []
        self.arrived_at: list[float] = []
        self.completion_times = np.empty(len(workload))
        self.finished = 0
        self.requests = 0
        self.alarms = 0

    @abstractmethod
    def arrived(self, job: JobOnEngine) -> None:
        """`job` has arrived."""

    @abstractmethod
    def reached(self, job: JobOnEngine, now: float) -> None:
        """`job` has come to an llm unit, whose calls it asks for."""

    @abstractmethod
    def submit(self, job: JobOnEngine, now: float) -> None:
        """Let the requests of an llm unit wait for their turn."""

    @abstractmethod
    def departed(self, job: JobOnEngine, now: float) -> None:
        """`job` is over."""

    def next_second(self) -> float:
        """The second at which something next happens outside of engines; infinity for never."""
        timed, arrival = self.agenda.next, self.arrivals.next
        return timed if timed < arrival else arrival

    def happen(self, now: float) -> None:
        """Let all that happens outside of engines up to `now` happen."""
        while True:
            if self.agenda.next <= min(now, self.arrivals.next):
                self.agenda.happen()
            elif self.arrivals.next <= now:
                self.arrive(self.arrivals.next)
            else:
                return

    def arrive(self, now: float) -> None:
        """Let the next job arrive."""
        entry = self.arrivals.take()
        job = self.jobs.make(entry, len(self.entries), now)
        cost = self.costs[job.application]
        job.entry, job.run = entry, self.runs[entry]
        job.prefill_seconds_per_token = cost.prefill_seconds_per_token
        job.decode_seconds_per_token = cost.decode_seconds_per_token
        job.unit_seconds = [execution_seconds(execution, cost) for execution in job.run]
        job.demand = sum(job.unit_seconds)
        self.entries.append(entry)
        self.arrived_at.append(now)
        self.arrived(job)
        self.policy.arrived(job, now)
        self.foresee(job, job.run, 0)
        self.start(job, now)

    def start(self, job: JobOnEngine, now: float) -> None:
        """Let `job`, which has arrived, begin its run."""
        self.start_unit(job, 0, now)

    def start_unit(self, job: JobOnEngine, position: int, now: float) -> None:
        """Let `job` come to a unit of its run."""
        job.position = position
        if not job.requests:  # else others beside it have asked before
            job.requested = now
        later = self.backends.plan(job, now)
        if job.execution.unit.kind != "llm":
            if self.backends.acquire(job, now, partial(self.begin, job, later)):
                self.begin(job, later, now)
            return
        number, turn = 0, job.submitted
        for count, given, made in call_groups(job.execution):
            if self.tables is None:
                job.calls.append(
                    Calls(job, number, count, given, made, position, now, turn + number)
                )
            else:  # each may find something else
                shared = min(shared_tokens(job.execution), given)
                for k in range(number, number + count):
                    calls = Calls(job, k, 1, given, made, position, now, turn + k)
                    calls.shared_tokens = shared
                    job.calls.append(calls)
            number += count
        job.requests += number
        job.submitted += number
        self.requests += number
        self.reached(job, now)
        self.backends.alarms(job, later)
        job.cold = self.backends.waits_for_its_turn(job)
        if job.cold or self.warm(job, now):
            self.submit(job, now)

    def warm(self, job: JobOnEngine, now: float) -> bool:
        """Whether the backend of an llm unit is warm; if not, the unit is submitted once it is."""
        return self.backends.acquire(job, now, partial(self.submit, job))

    def begin(self, job: JobOnEngine, later: Sequence[tuple[float, Action]], now: float) -> None:
        """Begin a unit that is executed outside of engines."""
        seconds = job.execution.seconds
        assert seconds is not None
        for after, action in later:
            self.agenda.add(now + after, action)
        self.agenda.add(now + seconds, partial(self.end_unit, job, job.position))

    def end_steps(self, engine: EngineAtWork, steps: int, now: float) -> None:
        """The steps that `engine` carried out end at second `now`: units may end with them."""
        ended, alarmed = engine.batcher.advance(steps, now)
        for job in ended:
            self.end_served(job, now)
        for job in alarmed:
            while job.alarms and job.alarms[-1][0] <= job.produced(engine.batch.step):
                self.alarms += 1
                job.alarms.pop()[1](now)

    def end_served(self, job: JobOnEngine, now: float) -> None:
        """A unit of `job` that an engine has served is over."""
        self.end_unit(job, job.position, now)

    def end_unit(self, job: JobOnEngine, position: int, now: float) -> None:
        """The unit of `job` at `position` is over."""
        execution = job.run[position]
        job.finished_seconds += job.unit_seconds[position]
        job.prefilled = job.generated = 0
        seconds = job.finished_seconds - job.attained_service
        job.attained_service = job.finished_seconds
        if execution.unit.kind != "llm" and seconds > 0.0:
            self.policy.served(job, seconds, now)
        self.backends.release(job, now)
        if position + 1 == len(job.run):
            self.finish(job, now)
            return
        if self.estimator is not None:
            progress = progress_after(job.run, position + 1, self.costs[job.application])
            ask_estimator(job, progress, self.estimator, self.policy)
        self.foresee(job, job.run, position + 1)
        self.start_unit(job, position + 1, now)

    def foresee(self, job: JobOnEngine, run: Sequence[Execution], finished: int) -> None:
        """Ask the predictor, if there is one, of what follows the first `finished` units."""
        if self.predictor is not None:
            cost = self.costs[job.application]
            ask_predictor(job, run, finished, self.predictor, self.policy, cost)

    def finish(self, job: JobOnEngine, now: float) -> None:
        """The run of `job` is over."""
        self.finished += 1
        self.completion_times[job.index] = now - job.arrival
        self.policy.departed(job, now)
        self.departed(job, now)
        self.arrivals.finished(job.entry, now)

    def place(self, job: JobOnEngine, now: float) -> tuple[Rank, int]:
        """Where `job` stands among those that wait for a backend: rank, order of arrival."""
        return rank_of(job, self.policy, now), job.index

    def events(self, engines: Sequence[EngineAtWork]) -> int:
        """How much happened: to jobs, to requests, at a second or alarm of its own, and steps."""
        requests = 2 * self.requests + sum(engine.batcher.preemptions for engine in engines)
        timed = self.agenda.happened + self.alarms
        return len(self.entries) + requests + timed + sum(engine.steps for engine in engines)

    def served(self) -> Workload:
        """The workload in order of arrival, once all jobs are over; times are then for reading."""
        self.completion_times.setflags(write=False)
        if isinstance(self.workload, ClosedLoop):
            return self.workload.arrived(self.entries, np.array(self.arrived_at))
        return self.workload


def _cost(workload: Workload, application: str) -> CostModel:
    graph = workload.graphs.get(application)
    return CostModel() if graph is None else graph.cost
