"""How far a batch is, in tensors that a compiled step reads and moves on."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Clock:
    """Where each row of the batch is; on the device, so that no step waits for it.

    Attributes:
        rank: real tokens of each row so far, that is, the rank of its next one; int64 `[batch]`.
        column: columns so far, int64 `[]`.
        valid: whether the column under way is a real token in each row, bool `[batch]`.
        padded: whether it may be padding in some row; never in an armed step.
    """

    rank: Tensor
    column: Tensor
    valid: Tensor
    padded: bool = False

    @classmethod
    def at(cls, rank: Tensor, column: int) -> "Clock":
        """A clock at `rank`, int64 `[batch]`, and `column`, in memory of its own."""
        clock = cls(
            rank=rank.clone(),
            column=torch.full((), column, dtype=torch.int64, device=rank.device),
            valid=torch.ones_like(rank, dtype=torch.bool),
        )
        keep_address(clock.rank, clock.column, clock.valid)
        return clock

    def fits(self, rank: Tensor) -> bool:
        """Whether it can be set to `rank` in place."""
        alike = (self.rank.shape, self.rank.device) == (rank.shape, rank.device)
        return alike and not frozen(self.rank)

    def set(self, rank: Tensor, column: int) -> None:
        """Go to `rank` and `column`, in place; the next column is real in every row."""
        self.rank.copy_(rank)
        self.column.fill_(column)
        self.expect(None)

    def expect(self, valid: Tensor | None) -> None:
        """Note in which rows the column to come is a real token, bool `[batch]`; None for all."""
        self.padded = valid is not None
        self.valid.fill_(True) if valid is None else self.valid.copy_(valid)

    @property
    def goes_on(self) -> Tensor | None:
        """`valid`; None where the column under way is real in every row."""
        return self.valid if self.padded else None

    @property
    def newest(self) -> Tensor:
        """Rank of each row's newest real token once the column under way is in, int64 `[batch]`."""
        return self.rank - self.valid.logical_not().long() if self.padded else self.rank

    def advance(self) -> None:
        """End the step: the column under way is over."""
        self.rank.add_(self.valid)
        self.column.add_(1)


def keep_address(*tensors: Tensor) -> None:
    """Tell torch.compile that these tensors stay where they are, so that CUDA graphs read them.

    Without a guard on the address: another cache of the same shapes is captured, not compiled.
    """
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor, guard=False)  # noqa: SLF001 (the documented way)


def frozen(tensor: Tensor) -> bool:
    """Whether it was made under `torch.inference_mode` and cannot be written to outside of it."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()
