"""A bound on how long a job may be overtaken."""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from demand.arguments import positive_number, positive_seconds
from demand.policies.base import Rank, number
from demand.policies.exact_thresholds import greatest_addend
from demand.policies.job import Job
from demand.policies.wrapper import Wrapper, check_by_number


@final
@dataclass(frozen=True)
class Aging(Wrapper):
    """Waiting improves a rank by `rate` per second, and no rank counts for more than `cap`.

    The rank of a job is min(max(r, 0), cap) + rate * arrival, r being the rank within. It orders
    as min(max(r, 0), cap) - rate * (now - arrival) does, `now` being the same for all.

    Claim: no job that arrives more than cap / rate seconds after another is ever served while the
    other waits. Proof: let j arrive after i by more than cap / rate. At every moment the rank of
    i is at most cap + rate * arrival_i, and that of j at least 0 + rate * arrival_j, which is
    more. So i goes first whenever both are there, whatever the ranks within are and however they
    move; a server that serves j has no waiting job of smaller rank. QED.

    Corollary, for one server that never idles: i finishes within V + A seconds of its arrival, V
    being the work present at its arrival (its own included) and A the work that arrives in the
    cap / rate seconds after it: until it finishes, the server works on nothing else. First come,
    first served is the case A = 0.

    Args:
        policy: ranks by seconds of demand or service, such as `Gittins`. Ranks that are seconds on
            the clock (`FCFS`, `EDF`, `LeastSlack`) soon exceed any cap, and then tell nothing.
        cap: seconds of rank.
        rate: seconds of rank per second of waiting.

    Raises:
        DemandError: a cap or rate that is not positive and finite;
            within, what is no policy or ranks by tuples.
    """

    cap: float
    rate: float

    def __post_init__(self) -> None:
        check_by_number(self, self.policy)
        object.__setattr__(self, "cap", positive_seconds("cap", self.cap))
        object.__setattr__(self, "rate", positive_number("rate", self.rate))

    @property
    def overtaking_seconds(self) -> float:
        """How much later than another a job may arrive and still go first."""
        return self.cap / self.rate

    @override
    def line(self, job: Job) -> Hashable:
        """Line under the policy within: jobs that rank in order of arrival there do so here."""
        return self.policy.line(job)

    @override
    def rank(self, job: Job, now: float) -> float:
        """min(max(rank within, 0), cap) + rate * arrival."""
        rank = number(self.policy.rank(job, now), self)
        return min(max(rank, 0.0), self.cap) + self.rate * job.arrival

    @override
    def next_above(self, job: Job, threshold: Rank) -> float:
        """Attained service at which the rank within exceeds the threshold less rate * arrival."""
        above, since = number(threshold, self), self.rate * job.arrival
        if self.cap + since <= above:
            return math.inf
        # The threshold is no less than the rank, nor then than 0 + since: clipping is over.
        return self.policy.next_above(job, greatest_addend(since, above))
