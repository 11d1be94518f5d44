"""Shortest expected remaining processing time."""

from dataclasses import dataclass
from typing import final

from typing_extensions import override

from demand.distribution.distribution import Distribution
from demand.distribution.rank_table import RankTable
from demand.policies.base import Policy, table_of
from demand.policies.job import Job


@final
@dataclass(frozen=True)
class SERPT(Policy):
    """Smallest mean remaining demand first: E[X - a | X > a] at attained service a.

    Not for an engine that recomputes the KV of whom it displaces (vLLM with `make_scheduler`,
    `Engine(preemption="recompute")`), as it is: where demands of one application differ widely, its
    ranks rise and fall with every sample that a job outlives, jobs take turns, and each turn is a
    prefill. On a mix without labels that is tens of times the mean of FCFS. Wrap it,
    `TimeSlice(SERPT(), 100.0)`, or let nobody be displaced (`preemption="none"`); docs/engine.md
    has the figures.
    """

    @override
    def table(self, distribution: Distribution) -> RankTable:
        """Mean remaining seconds by age."""
        return RankTable(distribution, variant="mean")

    @override
    def rank(self, job: Job, now: float) -> float:
        """Mean remaining seconds."""
        table = job.table or table_of(job)  # a call less, where most ranks are asked for
        return table.at(job.attained_service - job.known_at)
