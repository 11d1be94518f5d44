"""Classes of which one goes before the next, whatever the ranks within."""

import math
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from demand.policies.base import Policy, Rank
from demand.policies.job import Job
from demand.policies.wrapper import ByClass, Wrapper


@final
@dataclass(frozen=True)
class PriorityClasses(Wrapper, ByClass):
    """Jobs of smaller `priority` first; within a class by the policy.

    Preemptive: a job is served only while fewer jobs of the classes before it are there than
    servers. Nothing bounds how long the last class may wait.
    """

    @override
    def rank(self, job: Job, now: float) -> tuple[float, ...]:
        """(priority, rank within)."""
        return classed(job.priority, self.policy.rank(job, now))

    @override
    def next_above(self, job: Job, threshold: Rank) -> float:
        """Where the rank within exceeds that of the threshold, if their classes are the same."""
        return next_above_in_class(job.priority, self.policy, job, threshold)


def classed(number: int, rank: Rank) -> tuple[float, ...]:
    """The rank of a job of class `number` whose rank within the class is `rank`."""
    return (number, *rank) if isinstance(rank, tuple) else (number, rank)


def next_above_in_class(number: int, policy: Policy, job: Job, threshold: Rank) -> float:
    """`policy.next_above` for a job of class `number`, where the threshold is of any class."""
    assert isinstance(threshold, tuple)
    first, *rest = threshold
    if first == number:
        return policy.next_above(job, rest[0] if len(rest) == 1 else tuple(rest))
    return math.inf if first > number else job.attained_service
