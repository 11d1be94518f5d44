"""Jobs with deadlines before best-effort jobs, each by a policy of their own."""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from demand.distribution.distribution import Distribution
from demand.policies.base import Policy, Rank, check_policy
from demand.policies.job import Job
from demand.policies.priority_classes import classed, next_above_in_class
from demand.policies.wrapper import ByClass


@final
@dataclass(frozen=True)
class DeadlineMix(ByClass):
    """Jobs that have a deadline go first, by one policy; the others by another.

    As in the Hermes artifact, where applications with deadlines stay strictly ahead of those
    without. The rank is (0, rank by `urgent`) or (1, rank by `best_effort`).

    Args:
        urgent: serves the jobs with a deadline: `EDF()`, `LeastSlack()`.
        best_effort: serves the others: `Gittins()`.

    Raises:
        DemandError: one of them is no policy.
    """

    urgent: Policy
    best_effort: Policy

    def __post_init__(self) -> None:
        check_policy("urgent", self.urgent)
        check_policy("best_effort", self.best_effort)

    @property
    def reranks(self) -> bool:
        """Whether either does."""
        return self.urgent.reranks or self.best_effort.reranks

    @property
    def by_request(self) -> bool:
        """Whether either does."""
        return self.urgent.by_request or self.best_effort.by_request

    def table(self, distribution: Distribution) -> "_Sides":
        """The tables of both; a job takes that of its side."""
        return _Sides(self.urgent.table(distribution), self.best_effort.table(distribution))

    def new_state(self) -> "_Sides":
        """The states of both; a job takes that of its side."""
        return _Sides(self.urgent.new_state(), self.best_effort.new_state())

    def line(self, job: Job) -> Hashable:
        """That of its policy, on each side; one of its own, where serving others moves nobody."""
        side, policy = self._side(job)
        within = policy.line(job) if policy.reranks else job.index
        return None if within is None else (side, within)

    def rank(self, job: Job, now: float) -> tuple[float, ...]:
        """(side, rank by its policy)."""
        side, policy = self._side(job)
        return classed(side, policy.rank(job, now))

    def next_above(self, job: Job, threshold: Rank) -> float:
        """As its policy says, if the threshold is of the same side."""
        side, policy = self._side(job)
        return next_above_in_class(side, policy, job, threshold)

    def arrived(self, job: Job, now: float) -> None:
        """Passed to its policy."""
        self._side(job)[1].arrived(job, now)

    def served(self, job: Job, seconds: float, now: float) -> None:
        """Passed to its policy."""
        self._side(job)[1].served(job, seconds, now)

    def departed(self, job: Job, now: float) -> None:
        """Passed to its policy."""
        self._side(job)[1].departed(job, now)

    def _side(self, job: Job) -> tuple[int, Policy]:
        """Its side and policy; the job keeps of tables and states those of its side."""
        side = 0 if job.deadline < math.inf else 1
        if isinstance(job.table, _Sides):
            job.table = job.table[side]
        if isinstance(job.state, _Sides):
            job.state = job.state[side]
        return side, (self.urgent, self.best_effort)[side]


class _Sides(NamedTuple):
    """Tables or states of both policies, on jobs that have not taken theirs yet."""

    urgent: Any
    best_effort: Any
