"""How much of the budget the pinned tokens take."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sparsity.errors import SparsityError
from sparsity.policy import Policy


@dataclass(frozen=True)
class Pins:
    """Pinned tokens of each row; a page with one of them is pinned whole. int64 `[batch]` each.

    tokens: how many. pages: the pages they lie in. end: rank after the last of them.
    room: single tokens that each row can take in before all its pages are pinned and full; a very
    large number while some page can still be evicted.
    """

    tokens: Tensor
    pages: Tensor
    end: Tensor
    room: Tensor

    @classmethod
    def none(cls, batch: int, device: torch.device) -> "Pins":
        """Nothing is pinned."""
        zero = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(zero, zero, zero, zero)

    def take(self, index: Tensor) -> "Pins":
        """The rows of `index`, in that order."""
        return Pins(*(getattr(self, f.name)[index] for f in fields(self)))

    def add(self, policy: Policy, before: Tensor, after: Tensor) -> "Pins":
        """Pin the tokens of ranks `before` to `after` of each row (int64 `[batch]`).

        Raises SparsityError when that leaves nothing of the budget to decode with.
        """
        assert policy.budget is not None
        size, limit = policy.page_size, policy.budget // policy.page_size
        first, stop = before // size, -(-after // size)
        already = (self.end > first * size).to(torch.int64)  # the page that goes on may be pinned
        pages = self.pages + torch.where(after > before, stop - first - already, 0)
        tokens = self.tokens + after - before
        most, most_pages = int(tokens.max()), int(pages.max())
        if most >= policy.budget or most_pages > limit:
            name = type(policy).__name__
            raise SparsityError(
                f"{name}(budget={policy.budget}, page_size={size}) pins the prompt, and the prompt "
                f"has {most} tokens: nothing of the budget of {policy.budget} is left to decode "
                f"with. Raise the budget well above {max(most, most_pages * size)} tokens, or use "
                f"{name}(..., pin_prompt=False)"
            )
        room = torch.where(pages == limit, stop * size - after, torch.iinfo(torch.int64).max)
        return Pins(tokens, pages, torch.where(after > before, after, self.end), room)
