"""What a policy wants to be told."""

from collections.abc import Callable
from typing import Any, Literal

from demand.policies.base import Policy
from demand.policies.wrapper import Wrapper


def hook(
    policy: Policy, name: Literal["arrived", "served", "departed"]
) -> Callable[..., Any] | None:
    """The method to call at each such event; None where nobody would do anything with it.

    Wrappers that only pass on are passed over, since a simulator calls this at every event.
    """
    own = getattr(type(policy), name)
    if isinstance(policy, Wrapper) and own is getattr(Wrapper, name):
        return hook(policy.policy, name)
    return None if own is getattr(Policy, name) else getattr(policy, name)
