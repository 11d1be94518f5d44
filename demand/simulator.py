"""Preemptive-resume queue with one or more servers, simulated event by event."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from typing import final

import numpy as np

from demand.errors import DemandError
from demand.policies.base import Job, Policy
from demand.rank_table import RankTable
from demand.result import Result
from demand.workloads.workload import Workload


@final
@dataclass(frozen=True, eq=False)
class SimulationResult(Result):
    """What became of each job of a queue with `servers` servers.

    Its events are arrivals, completions and rank crossings.
    """

    servers: int

    def __repr__(self) -> str:
        return (
            f"SimulationResult({self.policy!r}, {self.completion_times.size} jobs, "
            f"{self.servers} server{'s' if self.servers > 1 else ''}, mean {self.mean:.4g} s, "
            f"p95 {self.quantile(0.95):.4g} s, {self.events} events, "
            f"{self.preemptions} preemptions)"
        )


def simulate(
    workload: Workload, policy: Policy, servers: int = 1, seed: int = 0
) -> SimulationResult:
    """Serve `workload` under `policy`, preempting at no cost: an M/G/k queue when it is Poisson.

    At every moment the `servers` jobs of least (rank, order of arrival) are served. Waiting jobs
    do not age, so their ranks stand still and sit in a heap; a running job can lose its place
    only at an arrival or where its own rank rises over the best one waiting, an age the policy
    gives exactly (`Policy.next_above`). The simulated events are therefore arrivals, completions
    and these crossings; there is no time step. O(events * (log n + servers)). Crossings add
    little as a rule; but where ranks rise with every atom (falling hazard under Gittins, or SERPT
    on two far modes) jobs of near-equal rank take turns, up to once per atom and job.

    Args:
        workload: the jobs.
        policy: ranks them.
        servers: how many jobs are served at once, each at one second of demand per second.
        seed: of the number each job draws (`Job.lottery`), which only `RandomOrder` reads; under
            every other policy the run is the same for all seeds.

    Raises:
        DemandError: no servers, or a policy that ranks NaN or contradicts itself.
    """
    if servers < 1:
        raise DemandError(f"servers is {servers}; expected at least 1")
    return _Simulation(workload, policy, servers, seed).run()


@dataclass(slots=True, eq=False)
class _Service:
    """A job being served: its attained service is as of second `since`."""

    job: Job
    since: float
    finish: float
    rank: float  # as of `since` too, once settled
    crossing: float = math.inf
    crossing_age: float = math.inf

    def after(self, other: "_Service") -> bool:
        return (self.rank, self.job.index) > (other.rank, other.job.index)


class _Simulation:
    def __init__(self, workload: Workload, policy: Policy, servers: int, seed: int) -> None:
        self.policy = policy
        self.workload = workload
        self.servers = servers
        tables: Mapping[str, RankTable | None] = {
            name: policy.table(known) for name, known in workload.distributions.items()
        }
        lottery = np.random.default_rng(seed).random(len(workload)).tolist()
        arrivals, demands = workload.arrivals.tolist(), workload.demands.tolist()
        self.jobs = [
            Job(i, name, at, workload.distributions[name], demand, 0.0, number, tables[name])
            for i, (name, at, demand, number) in enumerate(
                zip(workload.applications, arrivals, demands, lottery, strict=True)
            )
        ]
        self.waiting: list[tuple[float, int, Job]] = []
        self.running: list[_Service] = []
        self.events = 0
        self.preemptions = 0

    def run(self) -> SimulationResult:
        jobs, running = self.jobs, self.running
        completion_times = np.empty(len(jobs))
        arrived = 0
        next_arrival = jobs[0].arrival
        while running or arrived < len(jobs):
            # Of simultaneous events completions go first, so that no finished job is put back;
            # a moment has no length, so the order of the others changes no completion time.
            now, service, finished = next_arrival, None, False
            for candidate in running:
                if candidate.finish <= now:
                    now, service, finished = candidate.finish, candidate, True
                if candidate.crossing < now:
                    now, service, finished = candidate.crossing, candidate, False
            self.events += 1
            if service is None:
                self.arrive(jobs[arrived], now)
                arrived += 1
                next_arrival = jobs[arrived].arrival if arrived < len(jobs) else math.inf
            elif finished:
                running.remove(service)
                completion_times[service.job.index] = now - service.job.arrival
                if self.waiting:
                    self.start(heappop(self.waiting)[2], now)
                    self.settle(now)
            else:
                service.job.attained_service = service.crossing_age
                service.since = now
                self.settle(now)
        completion_times.setflags(write=False)
        return SimulationResult(
            self.policy,
            self.workload,
            completion_times,
            self.events,
            self.preemptions,
            self.servers,
        )

    def arrive(self, job: Job, now: float) -> None:
        if len(self.running) < self.servers:
            self.start(job, now)
            return
        heappush(self.waiting, (self.rank(job, now), job.index, job))
        if self.waiting[0][2] is job:  # behind a better one, it changes nothing yet
            self.settle(now)

    def start(self, job: Job, now: float, rank: float = math.nan) -> None:
        finish = now + max(job.demand - job.attained_service, 0.0)
        self.running.append(_Service(job, now, finish, rank))

    def settle(self, now: float) -> None:
        """Serve the jobs that go first, then find when each may lose its place."""
        for service in self.running:
            service.job.attained_service += now - service.since
            service.since = now
            service.rank = self.rank(service.job, now)
        while self.waiting:
            worst: _Service | None = None
            for service in self.running:
                if service.finish > now and (worst is None or service.after(worst)):
                    worst = service  # one that ends at this moment is as good as gone
            if worst is None or (worst.rank, worst.job.index) <= self.waiting[0][:2]:
                break
            self.running.remove(worst)
            self.preemptions += 1
            rank, _, job = heapreplace(self.waiting, (worst.rank, worst.job.index, worst.job))
            self.start(job, now, rank)
        for service in self.running:
            self.watch(service, now)

    def watch(self, service: _Service, now: float) -> None:
        """Find when the rank of a running job will rise over the best one waiting."""
        service.crossing = math.inf
        if not self.waiting or service.finish <= now:
            return
        job = service.job
        best_rank, best_index, _ = self.waiting[0]
        # At equal rank the earlier arrival goes first.
        threshold = best_rank if job.index < best_index else math.nextafter(best_rank, -math.inf)
        age = self.policy.next_above(job, threshold)
        if not age > job.attained_service:
            raise DemandError(
                f"{self.policy!r}.next_above gave {age} for job {job.index}, which has attained "
                f"{job.attained_service} and goes first; expected a later age"
            )
        if age < job.demand:
            service.crossing = now + (age - job.attained_service)
            service.crossing_age = age

    def rank(self, job: Job, now: float) -> float:
        rank = self.policy.rank(job, now)
        assert not isinstance(rank, tuple)
        if rank != rank:
            raise DemandError(f"{self.policy!r} ranked job {job.index} NaN; ranks must be ordered")
        return rank
