"""An attention mask that is evaluated on the columns of the tokens held, when it is needed."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsity.errors import SparsityError


@dataclass(frozen=True)
class LazyMask:
    """What transformers masks in one forward, as a rule that is not evaluated yet.

    A column is a position in the padded batch. The rule is evaluated on the columns of the tokens
    that are held, never on the places where they lie.

    Attributes:
        rule: `(batch, head, query column, key column) -> bool`, which broadcasts over its indices;
            None for plain causal attention.
        padding: bool `[batch, columns]`, False for padding; None where there is none.
        custom: the rule came from the user and may not broadcast.
        dense: makes the tensor that transformers itself would use, for layers that keep all tokens.
        lengths: how many queries and keys the mask was asked for; None where it was not asked for.
        masks: makes the mask that an attention implementation takes, given its name; None where
            that is not known.
        plain: nothing was added to plain causal attention but a window and padding.
    """

    rule: Callable[..., Tensor] | None
    padding: Tensor | None
    custom: bool
    dense: Callable[[], Tensor | None]
    lengths: tuple[int, int] | None = None
    masks: Callable[[str], Any] | None = None
    plain: bool = True
    _made: list[Tensor | None] = field(default_factory=list, compare=False)
    _own: dict[str, Any] = field(default_factory=dict, compare=False)

    def __call__(self, columns: Tensor, slots: Tensor) -> Tensor:
        """Where the queries may attend to the tokens held.

        Args:
            columns: of the queries, int64 `[q]`.
            slots: columns of the tokens, int `[batch, heads, n]`, -1 for none.

        Returns:
            bool `[batch, heads, q, n]`.

        Raises:
            SparsityError: for a rule of the user's, which cannot be evaluated on some of the
                tokens.
        """
        if self.custom:
            raise SparsityError(
                "the model adds a mask function of its own (vmapped), which cannot be evaluated on "
                "the retained tokens; use this model without SparseCache"
            )
        key = slots.clamp(min=0).long()
        allowed = slots >= 0
        if self.padding is not None:
            batch = torch.arange(key.shape[0], device=key.device)[:, None, None]
            allowed = allowed & self.padding.to(key.device)[batch, key]
        query = columns[None, None, :, None]
        if self.rule is None:
            return allowed[:, :, None] & (key[:, :, None] <= query)
        b = torch.arange(key.shape[0], device=key.device)[:, None, None, None]
        return allowed[:, :, None] & self.rule(b, torch.zeros_like(b[:1]), query, key[:, :, None])

    def tensor(self) -> Tensor | None:
        """The tensor that transformers itself would use; made once in a forward."""
        if not self._made:
            self._made.append(self.dense())
        return self._made[0]

    def own(self, implementation: str) -> Any:
        """The mask that an implementation takes; made once in a forward."""
        assert self.masks is not None
        if implementation not in self._own:
            self._own[implementation] = self.masks(implementation)
        return self._own[implementation]

    def to(self, *args: Any, **kwargs: Any) -> "LazyMask":
        """The same mask with its padding on another device; arguments as of `Tensor.to`."""
        if self.padding is None:
            return self
        return replace(self, padding=self.padding.to(*args, **kwargs))
