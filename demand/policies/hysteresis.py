"""A running job keeps its place unless beaten by a margin."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import final

from demand.policies.base import Rank, number
from demand.policies.exact_thresholds import check_positive, greatest_addend
from demand.policies.job import Job
from demand.policies.wrapper import Wrapper, check_by_number


@final
@dataclass(frozen=True)
class Hysteresis(Wrapper):
    """The rank of a running job counts for `margin` less, so that narrow leads do not preempt.

    Claim: a job is put back only for one whose rank within is smaller by at least `margin`. Proof:
    it is put back when (r - margin, order of arrival) exceeds that of a waiting job of rank w,
    which needs w <= r - margin. QED.

    Args:
        policy: of single-number ranks.
        margin: in units of rank, seconds for most policies.

    Raises:
        DemandError: a margin that is not positive and finite;
            within, what is no policy or ranks by tuples.
    """

    margin: float

    def __post_init__(self) -> None:
        check_by_number(self, self.policy)
        check_positive("margin", self.margin)

    def line(self, job: Job) -> Hashable:
        """As the policy within: jobs that wait have their rank within."""
        return self.policy.line(job)

    def rank(self, job: Job, now: float) -> float:
        """The rank within, less the margin if the job runs."""
        rank = number(self.policy.rank(job, now), self)
        return rank - self.margin if job.running else rank

    def next_above(self, job: Job, threshold: Rank) -> float:
        """Where the rank within exceeds the threshold by more than the margin."""
        above = number(threshold, self)
        return self.policy.next_above(job, greatest_addend(-self.margin, above))
