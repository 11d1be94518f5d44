"""The full cache: the reference row of every comparison."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from typing_extensions import override

from sparsity.policies.base import Policy, check_count


@dataclass(frozen=True)
class Full(Policy):
    """Keep everything and attend to everything: the same as dense attention.

    Args:
        page_size: tokens that memory grows by; has no influence on results.
    """

    page_size: int = 16
    budget: int | None = field(default=None, init=False)
    dense_layers: int = field(default=0, init=False)
    pin_prompt: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_count(self, "page_size", least=1)

    @property
    @override
    def evicts(self) -> bool:
        return False


def policy_of_layer(policy: Policy, layer: int, full_attention: Sequence[int]) -> Policy:
    """The policy that decides in one layer: `Full` in the first `dense_layers`, else `at_layer`.

    Args:
        policy: of the whole model.
        layer: index of the layer in the model.
        full_attention: indices of all layers with full attention, in order.
    """
    if layer < policy.dense_layers:
        return Full(policy.page_size)
    return policy.at_layer(full_attention.index(layer), len(full_attention))
