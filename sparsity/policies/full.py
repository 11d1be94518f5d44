"""The full cache: the reference row of every comparison."""

from dataclasses import dataclass, field

from sparsity.policies.base import Policy, check_count


@dataclass(frozen=True)
class Full(Policy):
    """Keep everything, attend to everything: equal to dense attention.

    page_size: tokens that memory grows by; it has no influence on results.
    """

    page_size: int = 16
    budget: int | None = field(default=None, init=False)
    dense_layers: int = field(default=0, init=False)
    pin_prompt: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_count(self, "page_size", least=1)

    @property
    def evicts(self) -> bool:
        """Nothing is ever evicted."""
        return False
