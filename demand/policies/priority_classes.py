"""Classes that go before each other whatever their ranks."""

import math
from dataclasses import dataclass
from typing import final

from demand.policies.base import Policy, Rank
from demand.policies.job import Job
from demand.policies.wrapper import ByClass, Wrapper


@final
@dataclass(frozen=True)
class PriorityClasses(Wrapper, ByClass):
    """Jobs of smaller `priority` first; within a class by the policy.

    Preemptive: a job is served only when too few of the classes before it are there. Nothing
    bounds how long the last class may wait.
    """

    def rank(self, job: Job, now: float) -> tuple[float, ...]:
        """(priority, rank within)."""
        return classed(job.priority, self.policy.rank(job, now))

    def next_above(self, job: Job, threshold: Rank) -> float:
        """Where the rank within exceeds that of the threshold, if their classes are the same."""
        return next_above_in_class(job.priority, self.policy, job, threshold)


def classed(number: int, rank: Rank) -> tuple[float, ...]:
    """`rank` within class `number`."""
    return (number, *rank) if isinstance(rank, tuple) else (number, rank)


def next_above_in_class(number: int, policy: Policy, job: Job, threshold: Rank) -> float:
    """`policy.next_above` for a job of class `number` and a threshold of any class."""
    assert isinstance(threshold, tuple)
    first, *rest = threshold
    if first == number:
        return policy.next_above(job, rest[0] if len(rest) == 1 else tuple(rest))
    return math.inf if first > number else job.attained_service
