"""The Gittins policy."""

from dataclasses import dataclass
from typing import final

from demand.distribution import Distribution
from demand.policies.base import Job, Policy
from demand.policies.tables import table_of
from demand.rank_table import RankTable


@final
@dataclass(frozen=True)
class Gittins(Policy):
    """Smallest Gittins rank first (Hermes, arXiv 2506.14851; equation at `gittins_rank`).

    Minimises mean completion time in the M/G/1 queue with preemption at no cost when the demand
    distributions are right (Aalto, Ayesta and Righter 2009); with samples in their place it is
    near-optimal (Ramakrishna et al. 2026, doi 10.1145/3788091).

    Departures from the Hermes artifact: the infimum is exact, over all D; its numerator counts
    the time spent on jobs that do not finish; a job beyond all samples does not get rank 0. The
    rank is that of the application's distribution at its attained service; it is not refined by
    which units have run. As in the artifact, nothing bounds how long a large job may wait.
    """

    def table(self, distribution: Distribution) -> RankTable:
        """Gittins ranks by age."""
        return RankTable(distribution)

    def rank(self, job: Job, now: float) -> float:
        """Gittins rank in seconds."""
        return table_of(job).at(job.age)
