"""Jobs with deadlines before best-effort jobs, each by a policy of their own."""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from typing_extensions import override

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
    @override
    def reranks(self) -> bool:
        return self.urgent.reranks or self.best_effort.reranks

    @property
    @override
    def by_request(self) -> bool:
        return self.urgent.by_request or self.best_effort.by_request

    @property
    @override
    def by_clock(self) -> bool:
        return self.urgent.by_clock or self.best_effort.by_clock

    @override
    def table(self, distribution: Distribution) -> "_Sides":
        """The tables of both policies; a job later keeps that of its side alone."""
        return _Sides(self.urgent.table(distribution), self.best_effort.table(distribution))

    @override
    def new_state(self) -> "_Sides":
        """The states of both policies; a job later keeps that of its side alone."""
        return _Sides(self.urgent.new_state(), self.best_effort.new_state())

    @override
    def line(self, job: Job) -> Hashable:
        """(side, line of the job under the policy of that side).

        Under a policy that does not rerank, each job is a line of its own.
        """
        side, policy = self._side(job)
        within = policy.line(job) if policy.reranks else job.index
        return None if within is None else (side, within)

    @override
    def rank(self, job: Job, now: float) -> tuple[float, ...]:
        """(side, rank by the policy of that side)."""
        side, policy = self._side(job)
        return classed(side, policy.rank(job, now))

    @override
    def next_above(self, job: Job, threshold: Rank) -> float:
        """As the policy of its side says, if the threshold is of the same side."""
        side, policy = self._side(job)
        return next_above_in_class(side, policy, job, threshold)

    @override
    def arrived(self, job: Job, now: float) -> None:
        self._side(job)[1].arrived(job, now)

    @override
    def served(self, job: Job, seconds: float, now: float) -> None:
        self._side(job)[1].served(job, seconds, now)

    @override
    def departed(self, job: Job, now: float) -> None:
        self._side(job)[1].departed(job, now)

    def _side(self, job: Job) -> tuple[int, Policy]:
        """The side of `job`, and its policy. The first time, the job takes its table and state."""
        side = 0 if job.deadline < math.inf else 1
        if isinstance(job.table, _Sides):
            job.table = job.table[side]
        if isinstance(job.state, _Sides):
            job.state = job.state[side]
        return side, (self.urgent, self.best_effort)[side]


class _Sides(NamedTuple):
    """Tables or states of both policies, on a job that has not yet taken those of its side."""

    urgent: Any
    best_effort: Any
