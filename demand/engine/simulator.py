"""Applications on a continuous-batching engine, simulated from event to event."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from demand.engine.agenda import Agenda
from demand.engine.batch import Batcher
from demand.engine.horizon import identical_steps
from demand.engine.model import Engine
from demand.engine.result import EngineResult
from demand.engine.tasks import Request, Task, call_tokens, check_run, execution_seconds
from demand.errors import DemandError
from demand.policies.base import Job, Policy
from demand.units import CostModel, Execution
from demand.workloads.workload import Workload


def simulate_engine(
    workload: Workload,
    policy: Policy,
    engine: Engine | None = None,
    cost: CostModel | None = None,
    seed: int = 0,
) -> EngineResult:
    """Serve the runs of `workload` on `engine`, its batches formed by `policy`.

    A job executes the units of its run one after the other. An llm unit submits `parallelism`
    requests at once (`Job.requested` is that second) and is over when the last of them is; other
    units take their seconds outside of the engine. `Engine` states the rules of a step.

    Ranks are those of the job. Its attained service is in seconds of the cost model, as in
    Hermes: what its finished units cost, and of the present unit the input tokens computed and
    the output tokens produced so far, over all calls; tokens that are prefilled again do not
    count, and a unit that is not an llm counts when it is over. A request-level policy ranks by
    `Job.requested`.

    Between two events the same step is repeated without being looked at: its end, an arrival,
    the last block or the age at which a rank crosses another are found by search.

    Args:
        workload: with `runs`.
        policy: ranks the jobs.
        engine: its limits and times; `None` for the defaults.
        cost: seconds of service of tokens, on the scale of the distributions of `workload`.
        seed: of the number each job draws (`Job.lottery`).

    Raises:
        DemandError: a workload without runs, an empty run, a request larger than all blocks, or
            a policy that ranks NaN.
    """
    if workload.runs is None:
        raise DemandError(
            "the workload has no runs, and an engine serves requests, not seconds; give "
            "Workload(runs=...), the executions of each job"
        )
    return _Simulation(
        workload,
        workload.runs,
        policy,
        Engine() if engine is None else engine,
        CostModel() if cost is None else cost,
        seed,
    ).run()


class _Simulation:
    def __init__(
        self,
        workload: Workload,
        runs: Sequence[Sequence[Execution]],
        policy: Policy,
        engine: Engine,
        cost: CostModel,
        seed: int,
    ) -> None:
        self.workload = workload
        self.policy = policy
        self.engine = engine
        self.cost = cost
        self.agenda = Agenda()
        self.batcher = Batcher(engine, policy, cost)
        self.tasks = _tasks(workload, runs, policy, engine, cost, seed)
        self.completion_times = np.empty(len(self.tasks))
        self.completion_steps = np.empty(len(self.tasks), dtype=np.int64)
        self.decisions = 0

    def run(self) -> EngineResult:
        agenda, batcher = self.agenda, self.batcher
        for task in self.tasks:
            agenda.add(task.job.arrival, partial(self.arrive, task))
        now = agenda.next
        while True:
            agenda.run_until(now)
            if not batcher.order:
                if agenda.next == np.inf:
                    break
                now = agenda.next
                continue
            batcher.form(now)
            self.decisions += 1
            now, over = batcher.advance(identical_steps(batcher, now, agenda.next), now)
            for task in over:
                self.end_unit(task, now)
        self.completion_times.setflags(write=False)
        self.completion_steps.setflags(write=False)
        blocks = batcher.blocks
        return EngineResult(
            self.policy,
            self.workload,
            self.completion_times,
            agenda.happened + self.decisions,
            batcher.preemptions,
            self.engine,
            self.completion_steps,
            batcher.steps,
            self.decisions,
            batcher.requests / max(batcher.steps, 1),
            blocks.prefilled_again,
            blocks.swapped,
            blocks.peak,
        )

    def arrive(self, task: Task, now: float) -> None:
        task.arrived_step = self.batcher.steps
        self.policy.arrived(task.job, now)
        self.start_unit(task, now)

    def start_unit(self, task: Task, now: float) -> None:
        task.at += 1
        if task.at == len(task.run):
            self.finish(task, now)
            return
        task.job.requested = now
        execution = task.execution
        if execution.unit.kind == "llm":
            task.prefilled = task.generated = 0
            task.requests = [
                Request(task, number, *tokens)
                for number, tokens in enumerate(call_tokens(execution))
            ]
            self.batcher.order.add(task, now)
        else:
            assert execution.seconds is not None
            self.agenda.add(now + execution.seconds, partial(self.end_unit, task))

    def end_unit(self, task: Task, now: float) -> None:
        job = task.job
        task.settled_seconds += execution_seconds(task.execution, self.cost)
        task.prefilled = task.generated = 0
        seconds = task.settled_seconds - job.attained_service
        job.attained_service = task.settled_seconds
        if task.execution.unit.kind != "llm" and seconds > 0.0:
            self.policy.served(job, seconds, now)
        self.start_unit(task, now)

    def finish(self, task: Task, now: float) -> None:
        job = task.job
        self.completion_times[job.index] = now - job.arrival
        self.completion_steps[job.index] = self.batcher.steps - task.arrived_step
        self.policy.departed(job, now)


def _tasks(
    workload: Workload,
    runs: Sequence[Sequence[Execution]],
    policy: Policy,
    engine: Engine,
    cost: CostModel,
    seed: int,
) -> list[Task]:
    tables = {name: policy.table(known) for name, known in workload.distributions.items()}
    state = policy.new_state()
    lottery = np.random.default_rng(seed).random(len(workload)).tolist()
    tasks = []
    for index, (name, arrival, run) in enumerate(
        zip(workload.applications, workload.arrivals.tolist(), runs, strict=True)
    ):
        check_run(index, run, engine)
        tenant = workload.tenants[index]
        job = Job(
            index,
            name,
            arrival,
            workload.distributions[name],
            sum(execution_seconds(execution, cost) for execution in run),
            0.0,
            lottery[index],
            tables[name],
            float(workload.deadlines[index]),
            tenant,
            workload.weights.get(tenant, 1.0),
            workload.priorities[index],
        )
        job.state = state
        tasks.append(Task(job, run))
    return tasks
