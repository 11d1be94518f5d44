"""A running job stays in service unless a waiting one leads by a margin."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from demand.arguments import positive_number
from demand.policies.base import Rank, number
from demand.policies.exact_thresholds import greatest_addend
from demand.policies.job import Job
from demand.policies.wrapper import Wrapper, check_by_number


@final
@dataclass(frozen=True)
class Hysteresis(Wrapper):
    """The rank of a running job counts for `margin` less, so that narrow leads do not preempt.

    Claim: a job is put back only for one whose rank within is smaller by at least `margin`. Proof:
    it is put back when (r - margin, order of arrival) exceeds that of a waiting job of rank w,
    which needs w <= r - margin. QED.

    The claim is about a waiting job that takes the place of a running one. Between two that run
    the margin cancels: where an engine runs out of KV blocks, the one of larger rank loses its own
    for any lead, and prefills it again.

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
        object.__setattr__(self, "margin", positive_number("margin", self.margin))

    @override
    def line(self, job: Job) -> Hashable:
        """Line under the policy within: waiting jobs have the rank they have there."""
        return self.policy.line(job)

    @override
    def rank(self, job: Job, now: float) -> float:
        """The rank within, less the margin if the job runs."""
        rank = number(self.policy.rank(job, now), self)
        return rank - self.margin if job.running else rank

    @override
    def next_above(self, job: Job, threshold: Rank) -> float:
        """Where the rank within exceeds the threshold by more than the margin."""
        above = number(threshold, self)
        return self.policy.next_above(job, greatest_addend(-self.margin, above))
