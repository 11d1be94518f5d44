"""What policies around a policy have in common."""

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.policies.base import Policy, check_policy
from demand.policies.job import Job


class ByClass(Policy, ABC):
    """A policy whose ranks are tuples: a class, and the rank within it."""


@dataclass(frozen=True)
class Wrapper(Policy, ABC):
    """A policy that changes the ranks of another; all the rest is left to that one.

    But for `line`: whether it holds depends on how ranks are changed, so that a wrapper that keeps
    the order within a line says so itself.

    Args:
        policy: the policy within, a wrapper itself if you like.

    Raises:
        DemandError: what is within is no policy.
    """

    policy: Policy

    def __post_init__(self) -> None:
        check_policy("policy", self.policy)

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


def check_by_number(outer: Policy, policy: object) -> None:
    """Raise `DemandError` unless `policy`, within `outer`, is one that ranks by one number."""
    check_policy("policy", policy)
    if isinstance(policy, ByClass):
        raise DemandError(
            f"{outer!r} is around a policy of tuple ranks; it takes policies that rank by one "
            "number: put PriorityClasses or DeadlineMix around it, not inside"
        )


def hook(
    policy: Policy, name: Literal["arrived", "served", "departed"]
) -> Callable[..., Any] | None:
    """The method to call at each such event; None where the policy keeps the default.

    Wrappers that only pass on are passed over, since a simulator calls this at every event.
    """
    method = getattr(policy, name)
    own = getattr(method, "__func__", method)  # of the class, unless the instance has its own
    if isinstance(policy, Wrapper) and own is getattr(Wrapper, name):
        return hook(policy.policy, name)
    return None if own is getattr(Policy, name) else method
