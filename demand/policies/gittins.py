"""The Gittins policy."""

from dataclasses import dataclass
from typing import final

from typing_extensions import override

from demand.distribution.distribution import Distribution
from demand.distribution.rank_table import RankTable
from demand.policies.base import Policy, table_of
from demand.policies.job import Job
from demand.seconds import check_seconds


@final
@dataclass(frozen=True)
class Gittins(Policy):
    """Smallest Gittins rank first (Hermes, arXiv 2506.14851; equation at `gittins_rank`).

    Minimises mean completion time in the M/G/1 queue with preemption at no cost when the demand
    distributions are right (Aalto, Ayesta and Righter 2009); with samples in their place it is
    near-optimal (Ramakrishna et al. 2026, doi 10.1145/3788091).

    Departures from the Hermes artifact: the infimum is exact, over all D; its numerator counts
    the time spent on jobs that do not finish; a job beyond all samples does not get rank 0. As in
    the artifact, nothing bounds how long a large job may wait: `Aging` does.

    Preemption at no cost is the assumption. Where an engine recomputes the KV of whom it displaces
    (vLLM with `make_scheduler`, `Engine(preemption="recompute")`), ranks that move with every
    sample a job outlives make jobs take turns, and on a mix without labels the mean is several
    times that of FCFS. Wrap it, `TimeSlice(Gittins(), 100.0)`, or let nobody be displaced
    (`preemption="none"`); docs/engine.md has the figures.

    Args:
        variant: as of `RankTable`: "gittins" is exact, "shifted" steadier on few samples;
            "bucketed" and "hermes_artifact" are there for comparison.
        quantum: least seconds of service between two decisions.
        preemption_cost: seconds lost by switching a job in. Jobs that are not running count it in
            their rank; the running one has paid it.

    Raises:
        DemandError: as `RankTable`.
    """

    variant: str = "gittins"
    quantum: float = 0.0
    preemption_cost: float = 0.0

    def __post_init__(self) -> None:
        for name in ("quantum", "preemption_cost"):
            object.__setattr__(self, name, check_seconds(name, getattr(self, name)))
        self.table(Distribution([1.0]))  # refuses what it cannot build

    @override
    def table(self, distribution: Distribution) -> "RankTable | _SwitchTable":
        """Gittins ranks by age; with a `preemption_cost`, of running and of waiting jobs apart."""
        running = RankTable(distribution, self.variant, quantum=self.quantum)
        if self.preemption_cost == 0.0:
            return running
        waiting = RankTable(
            distribution,
            self.variant,
            quantum=self.quantum,
            preemption_cost=self.preemption_cost,
        )
        return _SwitchTable(running, waiting)

    @override
    def rank(self, job: Job, now: float) -> float:
        """Gittins rank in seconds."""
        table = job.table or table_of(job)  # a call less, where most ranks are asked for
        age = job.attained_service - job.known_at
        if self.preemption_cost and not job.running:
            return table.waiting.at(age)
        return table.at(age)


@dataclass(frozen=True)
class _SwitchTable:
    """Ranks of a job that runs, and of the same job when it would first have to be switched in."""

    running: RankTable
    waiting: RankTable

    def at(self, age: float) -> float:
        return self.running.at(age)

    def next_above(self, age: float, threshold: float) -> float:
        return self.running.next_above(age, threshold)
