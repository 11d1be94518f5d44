"""Applications on a continuous-batching engine, simulated from event to event."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from demand.arguments import check_instance, renamed_keyword
from demand.errors import DemandError
from demand.policies.base import Policy, Rank, check_policy, rank_of
from demand.prewarm.base import Prewarmer, check_prewarmer
from demand.prewarm.baselines import NoPrewarm
from demand.refine.base import Refine
from demand.simulation.arrivals import arrivals_of, entries_of
from demand.simulation.engine.agenda import Action, Agenda
from demand.simulation.engine.backends import Backends, check_pools, checked_pools
from demand.simulation.engine.batcher import Batcher
from demand.simulation.engine.calls import (
    call_groups,
    check_run,
    execution_seconds,
    shared_tokens,
)
from demand.simulation.engine.engine import Engine
from demand.simulation.engine.identical_steps import identical_steps
from demand.simulation.engine.job_on_engine import Calls, JobOnEngine
from demand.simulation.engine.pools import Pool
from demand.simulation.engine.prefix_cache import PrefixCache
from demand.simulation.engine.result import EngineResult, Prefixes
from demand.simulation.engine.retention import Tables
from demand.simulation.engine.running_first import RunningFirst
from demand.simulation.engine.served_requests import ServedRequests
from demand.simulation.engine.step_times import StepLog
from demand.simulation.engine.waits import Waits, check_side_by_side
from demand.simulation.job_maker import JobMaker
from demand.simulation.refining import check_estimator, learn
from demand.stages import progress_after
from demand.units import CostModel, Execution, is_sequence
from demand.workloads.closed_loop import ClosedLoop
from demand.workloads.workload import Workload


@renamed_keyword("refine", "estimator")
@renamed_keyword("cost", "service_cost")
def simulate_engine(
    workload: Workload | ClosedLoop,
    policy: Policy,
    engine: Engine | None = None,
    *,
    backends: Mapping[str, Pool] | None = None,
    prewarm: Prewarmer | None = None,
    pace: CostModel | None = None,
    estimator: Refine | None = None,
    service_cost: CostModel | None = None,
    seed: int = 0,
) -> EngineResult:
    """Serve the runs of `workload` on `engine`, its batches formed by `policy`.

    A job executes the units of its run one after the other, or each as soon as those are over that
    it waits for (`Execution.after`), and ends when all have. An llm unit submits `parallelism`
    requests at once (`Job.requested` is that second; of units side by side, the one at which one
    last began while no request of the job was left) and is over when the last of them is; other
    units take their seconds outside of the engine. `Engine` states the rules of a step. A unit
    with a backend begins when that is warm (`Pool`).

    Ranks are those of the job. Its attained service is in seconds of the cost model, as in
    Hermes: what its finished units cost, and of the present unit the input tokens computed and
    the output tokens produced so far, over all calls; tokens that are prefilled again do not
    count, and a unit that is not an llm counts when it is over. The true demand that an oracle
    reads is the sum over the run, with the whole tokens that the engine serves. What happens
    while a step is in progress is taken in when it ends, in order of time; of one moment, ends of
    units go before arrivals.

    Between two decisions the same step is repeated: the end of a request, an arrival, the last
    block and the age at which a rank crosses another are found by search.

    Args:
        workload: with `runs`; the result of a closed loop has the jobs as they arrived.
        policy: ranks the jobs.
        engine: its limits and times; `None` for the defaults.
        backends: by name of a unit, or by kind for all other units of the kind.
        prewarm: warms backends ahead; `None` for `NoPrewarm`.
        pace: seconds of a call on this engine, by which the prewarmer is told when a unit will be
            over; `None` for `service_cost`.
        estimator: a `DemandEstimator`, or any other answer to how much is left; asked at the end of
            every unit.
        service_cost: seconds of attained service that a token counts for, on the scale of the
            distributions of `workload`; not what it takes on the engine. `None` for the cost model
            of the application's graph, or the default where it has none. Up to the last release
            it was named `cost`.
        seed: of the number each job draws (`Job.lottery`).

    Raises:
        DemandError: an argument of the wrong kind, a workload without runs, an empty run, a
            request larger than all blocks, a policy whose rank is no number, a pool for an unknown
            unit, or a prewarmer that needs graphs where there are none.
    """
    entries = entries_of(workload)
    check_policy("policy", policy)
    if entries.runs is None:
        raise DemandError(
            "the workload has no runs, and an engine serves requests, not seconds; give "
            "Workload(runs=...), the executions of each job"
        )
    check_estimator(estimator, entries)
    engine = Engine() if engine is None else engine
    prewarm = NoPrewarm() if prewarm is None else prewarm
    check_instance("engine", engine, Engine, "an engine, such as Engine(max_requests=64)")
    check_prewarmer("prewarm", prewarm)
    for name, model in (("pace", pace), ("service_cost", service_cost)):
        if model is not None:
            check_instance(name, model, CostModel, "a CostModel, or None")
    pools = {} if backends is None else checked_pools(backends)
    for entry, run in enumerate(entries.runs):
        check_run(entry, run, engine)
        check_side_by_side(entry, run, engine, bool(pools))
    check_pools(pools, prewarm, entries, entries.runs)
    costs = {name: service_cost or _cost(entries, name) for name in entries.distributions}
    simulation = _Simulation(
        workload, entries, entries.runs, policy, engine, costs, seed, estimator
    )
    simulation.backends = Backends(
        pools,
        prewarm,
        pace or service_cost or CostModel(),
        entries.graphs,
        simulation.agenda,
        simulation.place,
    )
    return simulation.run()


class _Simulation:
    backends: Backends

    def __init__(
        self,
        workload: Workload | ClosedLoop,
        entries: Workload,
        runs: Sequence[Sequence[Execution]],
        policy: Policy,
        engine: Engine,
        costs: Mapping[str, CostModel],
        seed: int,
        refine: Refine | None,
    ) -> None:
        self.workload = workload
        self.runs = runs
        self.policy = policy
        self.costs = costs
        self.refine = refine
        self.arrivals = arrivals_of(workload)
        self.jobs = JobMaker(entries, policy, JobOnEngine, seed)
        self.agenda = Agenda()
        self.cache: PrefixCache | None = None
        if engine.retention is not None:
            tables = Tables(engine.retention, entries.graphs, costs)
            self.cache = PrefixCache(engine.retention, tables, engine.block_tokens, engine.blocks)
        self.batcher = (
            RunningFirst(engine, policy, self.cache)
            if engine.scheduling == "running_first"
            else Batcher(engine, policy)
        )
        self.entries: list[int] = []  # in order of arrival
        self.arrived_at: list[float] = []
        self.completion_times = np.empty(len(workload))
        self.completion_steps = np.empty(len(workload), dtype=np.int64)
        self.finished = 0
        self.step_log = StepLog()
        self.steps = 0  # begun: those of the batch are carried out when what happened is taken in
        self.busy_seconds = 0.0
        self.decisions = 0
        self.requests = 0
        self.alarms = 0
        self.ahead = 0  # steps not taken in yet, of what happens in the one after them

    def run(self) -> EngineResult:
        now, order, count = 0.0, self.batcher.order, len(self.workload)
        while self.finished < count:
            if not order:
                now = self.next_second()
                assert now < math.inf, "jobs are left, and nothing is left to happen"
                self.step_log.add(now, 0, 0)
            if self.next_second() <= now:
                self.happen(now)
            if order:
                now = self.step(now)
        return self.result(now)

    def step(self, now: float) -> float:
        """Form a batch, and repeat its step as long as nothing changes.

        Returns:
            The second at which the last of these steps ends.
        """
        batcher = self.batcher
        batcher.form(now, self.warm)
        self.decisions += 1
        if not batcher.batch.size:
            return now
        upcoming = self.next_second()
        steps = identical_steps(batcher, now, upcoming)
        seconds = batcher.batch.seconds(steps)
        if self.cache is not None:
            self.cache.carry_out(batcher.batch, steps, now)
        now += seconds
        self.step_log.add(now, steps, batcher.batch.size)
        self.busy_seconds += seconds
        self.steps += steps
        if upcoming <= now:
            self.ahead = steps - 1
            self.happen(now)
            self.ahead = 0
        ended, alarmed = batcher.advance(steps, now)
        for job in ended:
            self.end_served(job, now)
        for job in alarmed:
            while job.alarms and job.alarms[-1][0] <= job.produced(batcher.batch.step):
                self.alarms += 1
                job.alarms.pop()[1](now)
        return now

    def next_second(self) -> float:
        """The second at which something next happens outside of the engine; infinity for never."""
        timed, arrival = self.agenda.next, self.arrivals.next
        return timed if timed < arrival else arrival

    def happen(self, now: float) -> None:
        """Let all that happens outside of the engine up to `now` happen."""
        while True:
            if self.agenda.next <= min(now, self.arrivals.next):
                self.agenda.happen()
            elif self.arrivals.next <= now:
                self.arrive(self.arrivals.next)
            else:
                return

    def arrive(self, now: float) -> None:
        entry = self.arrivals.take()
        job = self.jobs.make(entry, len(self.entries), now)
        cost = self.costs[job.application]
        job.entry, job.run, job.arrived_step = entry, self.runs[entry], self.steps
        job.prefill_seconds_per_token = cost.prefill_seconds_per_token
        job.decode_seconds_per_token = cost.decode_seconds_per_token
        job.unit_seconds = [execution_seconds(execution, cost) for execution in job.run]
        job.demand = sum(job.unit_seconds)
        self.entries.append(entry)
        self.arrived_at.append(now)
        self.policy.arrived(job, now)
        if is_sequence(job.run):
            self.start_unit(job, 0, now)
            return
        job.waits = Waits(job.run)
        for position in job.waits.first():
            self.start_unit(job, position, now)

    def start_unit(self, job: JobOnEngine, position: int, now: float) -> None:
        job.position = position
        joins = job.requests  # of units beside it
        if not joins:
            job.requested = now
        if job.waits is not None:
            job.waits.begin(position)
        later = self.backends.plan(job, now)
        if job.execution.unit.kind != "llm":
            if self.backends.acquire(job, now, partial(self.begin, job, later)):
                self.begin(job, later, now)
            return
        number, turn = 0, job.submitted
        for count, given, made in call_groups(job.execution):
            if self.cache is None:
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
        if self.cache is not None:
            self.cache.ask(job.calls[-number:], now)
        job.requests += number
        job.submitted += number
        self.requests += number
        if joins:
            self.batcher.join(job, number)
            return
        self.backends.alarms(job, later)
        job.cold = self.backends.waits_for_its_turn(job)
        if job.cold or self.warm(job, now):
            self.submit(job, now)

    def warm(self, job: JobOnEngine, now: float) -> bool:
        """Whether the backend of an llm unit is warm; if not, the unit is submitted once it is."""
        return self.backends.acquire(job, now, partial(self.submit, job))

    def submit(self, job: JobOnEngine, now: float) -> None:
        """Let the requests of an llm unit wait for their turn."""
        self.batcher.add(job, now)

    def begin(self, job: JobOnEngine, later: Sequence[tuple[float, Action]], now: float) -> None:
        """Begin a unit that is executed outside of the engine."""
        seconds = job.execution.seconds
        assert seconds is not None
        for after, action in later:
            self.agenda.add(now + after, action)
        end = self.end_unit if job.waits is None else self.end_beside
        self.agenda.add(now + seconds, partial(end, job, job.position))

    def end_served(self, job: JobOnEngine, now: float) -> None:
        """Units that the engine has served are over: the present one, or some of several."""
        if job.waits is None:
            self.end_unit(job, job.position, now)
            return
        served = {calls.position for calls in job.calls}
        for position in sorted(job.waits.underway):
            if position not in served and job.run[position].unit.kind == "llm":
                self.end_beside(job, position, now)

    def end_unit(self, job: JobOnEngine, position: int, now: float) -> None:
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
        if self.refine is not None:
            progress = progress_after(job.run, position + 1, self.costs[job.application])
            learn(job, progress, self.refine, self.policy)
        self.start_unit(job, position + 1, now)

    def end_beside(self, job: JobOnEngine, position: int, now: float) -> None:
        """A unit is over, beside which others may be underway."""
        assert job.waits is not None
        execution, step = job.run[position], self.batcher.batch.step + self.ahead
        job.finished_seconds += job.unit_seconds[position]
        if execution.unit.kind == "llm":
            for calls, given, made in call_groups(execution):
                job.prefilled -= calls * given
                job.generated -= calls * made
        attained = job.attained(step)
        seconds, job.attained_service = attained - job.attained_service, attained
        if seconds > 0.0:
            self.policy.served(job, seconds, now)
        ready = job.waits.end(position)
        if job.waits.over:
            self.finish(job, now)
            return
        if self.refine is not None:
            cost = self.costs[job.application]
            progress = job.waits.progress(ready, partial(job.received, step=step), cost)
            learn(job, progress, self.refine, self.policy)
        if job.calls:
            self.batcher.order.moved(job, now)
        for following in ready:
            self.start_unit(job, following, now)

    def finish(self, job: JobOnEngine, now: float) -> None:
        self.finished += 1
        self.completion_times[job.index] = now - job.arrival
        self.completion_steps[job.index] = self.steps - job.arrived_step
        self.policy.departed(job, now)
        if self.cache is not None:
            self.cache.end(job)
        self.arrivals.finished(job.entry, now)

    def place(self, job: JobOnEngine, now: float) -> tuple[Rank, int]:
        """Where `job` stands among those that wait for a backend: rank, order of arrival."""
        return rank_of(job, self.policy, now), job.index

    def events(self) -> int:
        """How much happened: to jobs, to requests, at a second or alarm of its own, and steps."""
        requests = 2 * self.requests + self.batcher.preemptions
        timed = self.agenda.happened + self.alarms
        return len(self.entries) + requests + timed + self.steps

    def result(self, now: float) -> EngineResult:
        batcher, batch, workload = self.batcher, self.batcher.batch, self.workload
        if isinstance(workload, ClosedLoop):
            workload = workload.arrived(self.entries, np.array(self.arrived_at))
        self.completion_times.setflags(write=False)
        self.completion_steps.setflags(write=False)
        return EngineResult(
            self.policy,
            workload,
            self.completion_times,
            self.events(),
            batcher.preemptions,
            batch.engine,
            self.completion_steps,
            self.steps,
            self.decisions,
            self.busy_seconds,
            batch.requests / max(self.steps, 1),
            batch.blocks.prefilled_again,
            batch.blocks.swapped,
            batch.blocks.peak,
            self.backends.reports(now),
            ServedRequests(
                batch.log,
                self.step_log,
                batch.engine.kv_seconds_per_token,
                batch.engine.block_tokens,
                workload.applications,
            ),
            Prefixes() if self.cache is None else self.cache.report(),
        )


def _cost(workload: Workload, application: str) -> CostModel:
    graph = workload.graphs.get(application)
    return CostModel() if graph is None else graph.cost
