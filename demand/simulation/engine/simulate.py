"""Applications on a continuous-batching engine, simulated from event to event."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, final

import numpy as np

from demand.arguments import renamed_keyword
from demand.policies.base import Policy
from demand.prewarm.base import Prewarmer
from demand.refine.base import Estimator
from demand.refine.predictor import Predictor
from demand.simulation.engine.applications import Applications
from demand.simulation.engine.calls import call_groups
from demand.simulation.engine.engine import Engine
from demand.simulation.engine.engine_at_work import EngineAtWork
from demand.simulation.engine.identical_steps import identical_steps
from demand.simulation.engine.job_on_engine import JobOnEngine
from demand.simulation.engine.pools import Pool
from demand.simulation.engine.prefix_cache import PrefixCache
from demand.simulation.engine.result import EngineResult, Prefixes
from demand.simulation.engine.waits import Waits
from demand.simulation.refining import ask_estimator
from demand.units import CostModel, is_sequence
from demand.workloads.closed_loop import ClosedLoop
from demand.workloads.workload import Workload


@renamed_keyword("refine", "estimator")
@renamed_keyword("service_cost", "cost")
def simulate_engine(
    workload: Workload | ClosedLoop,
    policy: Policy,
    engine: Engine | None = None,
    *,
    backends: Mapping[str, Pool] | None = None,
    prewarm: Prewarmer | None = None,
    pace: CostModel | None = None,
    estimator: Estimator | None = None,
    predictor: Predictor | None = None,
    cost: CostModel | None = None,
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
            over; `None` for `cost`. It says what a call takes, `cost` what it counts for.
        estimator: a `DemandEstimator`, or any other answer to how much is left; asked at the end of
            every unit.
        predictor: what says it from a call before its first token; asked as a job arrives and,
            after the estimator, at the end of every unit, if what follows is a call to a model and
            nothing of its stage has been served. Its answer holds from there on.
        cost: seconds of attained service that a token counts for, on the scale of the
            distributions of `workload`; not what it takes on the engine, which is `pace`. `None`
            for the cost model of the application's graph, or the default where it has none.
        seed: of the number each job draws (`Job.lottery`).

    Raises:
        DemandError: an argument of the wrong kind, a workload without runs, an empty run, a
            request larger than all blocks, a policy whose rank is no number, an estimator or
            predictor that gives no distribution, a pool for an unknown unit, or a prewarmer that
            needs graphs where there are none.
    """
    simulation = _Simulation(
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
    return simulation.run()


@final
class _Simulation(Applications):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cache = None if self.tables is None else PrefixCache(self.engine, self.tables)
        self.one = EngineAtWork(self.engine, self.policy, self.cache)
        self.completion_steps = np.empty(len(self.workload), dtype=np.int64)
        self.ahead = 0  # steps not taken in yet, of what happens in the one after them

    def run(self) -> EngineResult:
        now, engine, order, count = 0.0, self.one, self.one.order, len(self.workload)
        while self.finished < count:
            upcoming = self.next_second()
            if not order:
                now = upcoming
                assert now < math.inf, "jobs are left, and nothing is left to happen"
                engine.rest(now)
            if upcoming <= now:
                self.happen(now)
            if order and engine.form(now, self.warm):
                upcoming = self.next_second()
                steps = identical_steps(engine.batcher, now, upcoming)
                now = engine.carry_out(steps, now)
                if upcoming <= now:
                    self.ahead = steps - 1
                    self.happen(now)
                    self.ahead = 0
                self.end_steps(engine, steps, now)
        return self.result(now)

    def arrived(self, job: JobOnEngine) -> None:
        job.arrived_step = self.one.steps

    def reached(self, job: JobOnEngine, now: float) -> None:
        if self.cache is not None:
            self.cache.ask(job, now)

    def start(self, job: JobOnEngine, now: float) -> None:
        if is_sequence(job.run):
            super().start(job, now)
            return
        job.waits = Waits(job.run)
        for position in job.waits.first():
            self.start_unit(job, position, now)

    def start_unit(self, job: JobOnEngine, position: int, now: float) -> None:
        if job.waits is not None:
            job.waits.begin(position)
        super().start_unit(job, position, now)

    def submit(self, job: JobOnEngine, now: float) -> None:
        batcher = self.one.batcher
        if job.waits is not None:
            requests = sum(calls.count for calls in job.calls if calls.position == job.position)
            if requests < job.requests:
                batcher.join(job, requests)
                return
        batcher.add(job, now)

    def end_served(self, job: JobOnEngine, now: float) -> None:
        if job.waits is None:
            super().end_unit(job, job.position, now)
            return
        served = {calls.position for calls in job.calls}
        for position in sorted(job.waits.underway):
            if position not in served and job.run[position].unit.kind == "llm":
                self.end_unit(job, position, now)

    def end_unit(self, job: JobOnEngine, position: int, now: float) -> None:
        if job.waits is None:
            super().end_unit(job, position, now)
        else:
            self.end_beside(job, job.waits, position, now)

    def end_beside(self, job: JobOnEngine, waits: Waits, position: int, now: float) -> None:
        """A unit is over, beside which others may be underway."""
        execution, step = job.run[position], self.one.batch.step + self.ahead
        job.finished_seconds += job.unit_seconds[position]
        if execution.unit.kind == "llm":
            for calls, given, made in call_groups(execution):
                job.prefilled -= calls * given
                job.generated -= calls * made
        attained = job.attained(step)
        seconds, job.attained_service = attained - job.attained_service, attained
        if seconds > 0.0:
            self.policy.served(job, seconds, now)
        ready = waits.end(position)
        if waits.over:
            self.finish(job, now)
            return
        if self.estimator is not None or self.predictor is not None:
            cost = self.costs[job.application]
            progress = waits.progress(ready, partial(job.received, step=step), cost)
            if self.estimator is not None:
                ask_estimator(job, progress, self.estimator, self.policy)
            if self.predictor is not None and progress.current is None:
                self.foresee(job, waits.as_ended(), len(waits.ended))
        if job.calls:
            self.one.order.moved(job, now)
        for following in ready:
            self.start_unit(job, following, now)

    def departed(self, job: JobOnEngine, now: float) -> None:
        self.completion_steps[job.index] = self.one.steps - job.arrived_step
        if self.cache is not None:
            self.cache.end(job)

    def result(self, now: float) -> EngineResult:
        workload, engine, batch = self.served(), self.one, self.one.batch
        self.completion_steps.setflags(write=False)
        return EngineResult(
            self.policy,
            workload,
            self.completion_times,
            self.events([engine]),
            engine.batcher.preemptions,
            self.engine,
            self.completion_steps,
            engine.steps,
            engine.decisions,
            engine.busy_seconds,
            batch.requests / max(engine.steps, 1),
            batch.blocks.prefilled_again,
            batch.blocks.swapped,
            batch.blocks.peak,
            self.backends.reports(now),
            engine.served(workload.applications),
            Prefixes() if self.cache is None else self.cache.report(),
        )
