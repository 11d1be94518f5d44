"""What a policy wants to be told."""

from collections.abc import Callable
from typing import Any, Literal

from demand.policies.base import Policy
from demand.policies.wrapper import Wrapper


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
