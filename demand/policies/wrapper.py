"""What policies around a policy have in common."""

from abc import ABC
from dataclasses import dataclass
from typing import Any

from demand.distribution import Distribution
from demand.policies.base import Job, Policy


@dataclass(frozen=True)
class Wrapper(Policy, ABC):
    """A policy that changes the ranks of another; all the rest is left to that one.

    Args:
        policy: the policy within, a wrapper itself if you like.
    """

    policy: Policy

    @property
    def reranks(self) -> bool:
        """As the policy within."""
        return self.policy.reranks

    @property
    def by_request(self) -> bool:
        """As the policy within."""
        return self.policy.by_request

    def table(self, distribution: Distribution) -> Any:
        """The table of the policy within."""
        return self.policy.table(distribution)

    def new_state(self) -> Any:
        """The state of the policy within."""
        return self.policy.new_state()

    def arrived(self, job: Job, now: float) -> None:
        """Passed on."""
        self.policy.arrived(job, now)

    def served(self, job: Job, seconds: float, now: float) -> None:
        """Passed on."""
        self.policy.served(job, seconds, now)

    def departed(self, job: Job, now: float) -> None:
        """Passed on."""
        self.policy.departed(job, now)
