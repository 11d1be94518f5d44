"""A preemptive-resume queue with one or more servers, simulated event by event."""

import math
from dataclasses import dataclass
from typing import final

import numpy as np

from demand.arguments import renamed_keyword, whole_number
from demand.policies.base import Policy, check_policy
from demand.policies.wrapper import hook
from demand.refine.base import Estimator
from demand.refine.predictor import Predictor
from demand.simulation.arrivals import arrivals_of, entries_of
from demand.simulation.job_maker import JobMaker
from demand.simulation.queue.bounded_servers import servers_for
from demand.simulation.queue.job_in_service import JobInService
from demand.simulation.refining import (
    ask_estimator,
    ask_predictor,
    check_estimator,
    check_predictor,
)
from demand.simulation.result import Result
from demand.stages import progress_after
from demand.workloads.closed_loop import ClosedLoop
from demand.workloads.workload import Workload


@final
@dataclass(frozen=True, eq=False)
class SimulationResult(Result):
    """What became of each job of a queue with `servers` servers.

    Its events are arrivals, completions, ends of units where they matter, and rank crossings.
    """

    servers: int

    def __repr__(self) -> str:
        return (
            f"SimulationResult({self.policy!r}, {self.completion_times.size} jobs, "
            f"{self.servers} server{'s' if self.servers > 1 else ''}, mean {self.mean:.4g} s, "
            f"p95 {self.quantile(0.95):.4g} s, {self.events} events, "
            f"{self.preemptions} preemptions)"
        )


@renamed_keyword("refine", "estimator")
def simulate(
    workload: Workload | ClosedLoop,
    policy: Policy,
    servers: int = 1,
    seed: int = 0,
    estimator: Estimator | None = None,
    predictor: Predictor | None = None,
) -> SimulationResult:
    """Serve `workload` under `policy`, preempting at no cost: an M/G/k queue when it is Poisson.

    At every moment the `servers` jobs of least (rank, order of arrival) are served, each at one
    second of demand per second, whatever its units are: those that could go side by side
    (`Execution.after`) are served one after the other, as its run has them. All that happens at one
    moment happens before it is decided who is served: completions and ends of units in order of
    service, then arrivals.

    Waiting jobs do not age, so their ranks stand still and sit in a heap; a running job can lose
    its place only at an arrival, at the end of a unit, or where its own rank rises over the best
    one waiting, an age the policy gives (`Policy.next_above`). The simulated events are therefore
    arrivals, completions, ends of units and these crossings; there is no time step.
    With several servers a running job is ranked only where a bound on its rank does not tell
    whether it comes after another; reaching its bound is no event.
    O(events * (log n + servers)), and for a policy that `reranks`, O(events * jobs present), or
    of lines present where it names them (`Policy.line`).
    Crossings add little as a rule; but where ranks rise with every atom (falling hazard under
    Gittins, or SERPT on two far modes) jobs of near-equal rank take turns, up to once per atom
    and job.

    Ends of units are events if `estimator` or `predictor` is given or the policy ranks by request:
    the next unit is then a new request (`Job.requested`), and what `estimator` says of the units
    finished so far is what the scheduler knows from there on. A `predictor` is asked after it, as a
    job arrives and at each of these ends, if what follows is a call to a model and nothing of its
    stage is over: its answer holds, then, from before the first token. The seconds of a unit are
    those of the cost model of the application's graph (`workload.graphs`), or of the default one.

    Args:
        workload: the jobs; the result of a closed loop has them as they arrived.
        policy: ranks them.
        servers: how many jobs are served at once.
        seed: of the number each job draws (`Job.lottery`), which only `RandomOrder` reads; under
            every other policy the run is the same for all seeds.
        estimator: a `DemandEstimator`, or any other answer to how much is left. It is asked, and
            does not learn from the jobs that end.
        predictor: what says it from a call before its first token.

    Raises:
        DemandError: a workload, policy, estimator or predictor that is none; servers that are not a
            whole number of at least 1; a policy whose rank is no number, or that contradicts
            itself; where ends of units matter, a workload without runs, or a run whose units do not
            add up to its demand.
    """
    entries = entries_of(workload)
    check_policy("policy", policy)
    check_estimator(estimator, entries)
    check_predictor(predictor, entries)
    servers = whole_number("servers", servers, least=1)
    return _Simulation(workload, entries, policy, servers, seed, estimator, predictor).run()


class _Simulation:
    def __init__(
        self,
        workload: Workload | ClosedLoop,
        entries: Workload,
        policy: Policy,
        servers: int,
        seed: int,
        estimator: Estimator | None,
        predictor: Predictor | None,
    ) -> None:
        self.workload = workload
        self.policy = policy
        self.estimator, self.predictor = estimator, predictor
        by_unit = estimator is not None or predictor is not None or policy.by_request
        self.runs = entries.runs if by_unit else None
        self.arrivals = arrivals_of(workload)
        self.jobs = JobMaker(entries, policy, JobInService, seed)
        self.server_count = servers
        self.servers = servers_for(policy, servers)
        self.arrived, self.departed = hook(policy, "arrived"), hook(policy, "departed")
        self.entries: list[int] = []  # in order of arrival
        self.arrived_at: list[float] = []
        self.completion_times = np.empty(len(workload))
        self.events = 0

    def run(self) -> SimulationResult:
        arrivals, servers, running = self.arrivals, self.servers, self.servers.running
        reranks = self.policy.reranks
        while True:
            now = arrivals.next
            stopped: list[JobInService] = []
            for job in running:
                if job.stop < now:
                    now, stopped = job.stop, [job]
                elif job.stop == now:
                    stopped.append(job)
            if now == math.inf:
                return self.result()
            if stopped or reranks:
                servers.serve(stopped, now)
                for job in stopped:
                    if job.stop_attained == job.ends[job.units_finished]:
                        self.events += 1
                        self.end_unit(job, now)
                    elif servers.stop_within_unit(job, now):
                        self.events += 1
            while arrivals.next == now:
                self.events += 1
                self.arrive(now)
            servers.decide(now)

    def arrive(self, now: float) -> None:
        entry = self.arrivals.take()
        job = self.jobs.make(entry, len(self.entries), now)
        job.entry = entry
        self.entries.append(entry)
        self.arrived_at.append(now)
        if self.arrived is not None:
            self.arrived(job, now)
        job.ends = (job.demand,) if self.runs is None else self.jobs.unit_ends(entry)
        if self.predictor is not None and self.runs is not None:
            self.foresee(job, 0, self.predictor)
        self.servers.add(job)

    def end_unit(self, job: JobInService, now: float) -> None:
        """A job is at the end of a unit, its last one perhaps."""
        ends, finished = job.ends, job.units_finished
        while finished < len(ends) and ends[finished] <= job.attained_service:
            finished += 1
        if finished == len(ends):
            self.servers.leave(job)
            self.completion_times[job.index] = now - job.arrival
            if self.departed is not None:
                self.departed(job, now)
            self.arrivals.finished(job.entry, now)
            return
        self.servers.end_unit(job)
        job.units_finished = finished
        job.requested = now
        if self.estimator is not None and self.runs is not None:
            progress = progress_after(self.runs[job.entry], finished, self.jobs.cost(job.entry))
            ask_estimator(job, progress, self.estimator, self.policy)
        if self.predictor is not None and self.runs is not None:
            self.foresee(job, finished, self.predictor)

    def foresee(self, job: JobInService, finished: int, predictor: Predictor) -> None:
        assert self.runs is not None
        run, cost = self.runs[job.entry], self.jobs.cost(job.entry)
        ask_predictor(job, run, finished, predictor, self.policy, cost)

    def result(self) -> SimulationResult:
        workload = self.workload
        if isinstance(workload, ClosedLoop):
            workload = workload.arrived(self.entries, np.array(self.arrived_at))
        self.completion_times.setflags(write=False)
        return SimulationResult(
            self.policy,
            workload,
            self.completion_times,
            self.events,
            self.servers.preemptions,
            self.server_count,
        )
