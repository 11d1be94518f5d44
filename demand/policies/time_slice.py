"""A running job stays in service until it has had a quantum."""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from demand.arguments import positive_seconds
from demand.policies.base import Rank, number
from demand.policies.job import Job
from demand.policies.wrapper import Wrapper, check_by_number
from demand.seconds import check_age


@final
@dataclass(frozen=True)
class TimeSlice(Wrapper):
    """Once put into service a job is served for `seconds` before another may take its server.

    Claim: between two preemptions of a job it receives at least `seconds` of service, so that a
    job of demand d is put back at most d / seconds times. Proof: its rank is minus infinity until
    then, and only a smaller rank takes a server. QED.

    The claim is about servers and places. Where an engine runs out of KV blocks, one of those that
    run loses its own, and jobs within their quantum go last in order of arrival.

    `Gittins` has a `quantum` of its own, which changes what it ranks by and not who may preempt.

    Args:
        policy: of single-number ranks.
        seconds: of service.

    Raises:
        DemandError: seconds that are not positive and finite;
            within, what is no policy or ranks by tuples.
    """

    seconds: float

    def __post_init__(self) -> None:
        check_by_number(self, self.policy)
        object.__setattr__(self, "seconds", positive_seconds("seconds", self.seconds))

    @override
    def line(self, job: Job) -> Hashable:
        """Line under the policy within: waiting jobs have the rank they have there."""
        return self.policy.line(job)

    @override
    def rank(self, job: Job, now: float) -> float:
        """Minus infinity within the quantum, the rank within afterwards."""
        if job.running and check_age(job.attained_service) < self._end(job):
            return -math.inf
        return number(self.policy.rank(job, now), self)

    @override
    def next_above(self, job: Job, threshold: Rank) -> float:
        """The end of the quantum; after it, where the rank within exceeds the threshold."""
        end = self._end(job)
        if job.attained_service < end:
            return end if number(threshold, self) < math.inf else math.inf
        return self.policy.next_above(job, threshold)

    def _end(self, job: Job) -> float:
        return job.started_at + self.seconds
