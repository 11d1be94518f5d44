"""What policies around a policy have in common, and whom a scheduler has to tell of events."""

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import override

from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.policies.base import Policy, check_policy
from demand.policies.job import Job


class ByClass(Policy, ABC):
    """A policy whose ranks are tuples: a class, and the rank within it."""


@dataclass(frozen=True)
class Wrapper(Policy, ABC):
    """A policy that changes the ranks of another and leaves all the rest to it, except `line`.

    Whether the jobs of a line still rank in order of arrival depends on how a wrapper changes
    ranks. One that keeps their order says so itself, by `line`; by default there are no lines.

    Args:
        policy: the policy within, a wrapper itself if you like.

    Raises:
        DemandError: what is within is no policy.
    """

    policy: Policy

    def __post_init__(self) -> None:
        check_policy("policy", self.policy)

    @property
    @override
    def reranks(self) -> bool:
        return self.policy.reranks

    @property
    @override
    def by_request(self) -> bool:
        return self.policy.by_request

    @property
    @override
    def by_clock(self) -> bool:
        return self.policy.by_clock

    @override
    def table(self, distribution: Distribution) -> Any:
        return self.policy.table(distribution)

    @override
    def new_state(self) -> Any:
        return self.policy.new_state()

    @override
    def arrived(self, job: Job, now: float) -> None:
        self.policy.arrived(job, now)

    @override
    def served(self, job: Job, seconds: float, now: float) -> None:
        self.policy.served(job, seconds, now)

    @override
    def departed(self, job: Job, now: float) -> None:
        self.policy.departed(job, now)


def check_by_number(outer: Policy, policy: object) -> None:
    """Raise `DemandError` unless `policy`, the one within `outer`, ranks by one number."""
    check_policy("policy", policy)
    if isinstance(policy, ByClass):
        raise DemandError(
            f"{outer!r} is around a policy of tuple ranks; it takes policies that rank by one "
            "number: put PriorityClasses or DeadlineMix around it, not inside"
        )


def hook(
    policy: Policy, name: Literal["arrived", "served", "departed"]
) -> Callable[..., Any] | None:
    """The method of `policy` to call at each event of this name; `None` where it does nothing.

    A wrapper that only passes the event on is skipped: it is the method of the policy within that
    is returned, since a simulator calls it at every event.
    """
    method = getattr(policy, name)
    own = getattr(method, "__func__", method)  # of the class, unless the instance has its own
    if isinstance(policy, Wrapper) and own is getattr(Wrapper, name):
        return hook(policy.policy, name)
    return None if own is getattr(Policy, name) else method
