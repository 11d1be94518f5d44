"""The base of policies that evict, with the parameters they share, defined and checked once."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from sparsity.arguments import take_flag
from sparsity.errors import SparsityError
from sparsity.policies.base import Group, PageView, Policy, check_budget, check_count, check_group
from sparsity.policies.scores import without_rounding


@dataclass(frozen=True)
class Evicting(Policy):
    """A policy that keeps `budget` tokens for each KV head and evicts the pages worth least.

    A policy derives from this class, defines `worth`, changes the defaults below, and fixes the
    arguments that make no sense for it with ``field(default=..., init=False)``.

    Args:
        budget: tokens that a KV head keeps, all that is protected or pinned included.
        page_size: tokens that are kept or evicted together; divides the budget.
        sinks: this many first tokens of a row are protected.
        recent: this many newest tokens of a row are protected; None for the policy's own number.
        pin_prompt: never evict tokens that arrived several in one forward.
        dense_layers: this many first layers of the model keep everything.
        shared_heads: one decision for all KV heads of a layer, by their mean worth.
        group: "mean" or "max" over the query heads that share a KV head.
        evict_every: while decoding, evict once in this many tokens, so that between budget and
            budget + evict_every - 1 tokens are held. A multiple of `page_size`, or 1 to evict
            whenever a page is needed.

    Raises:
        SparsityError: for arguments out of range, and where what is protected fills the budget.
    """

    budget: int
    page_size: int = 1
    sinks: int = 0
    recent: int | None = 0
    pin_prompt: bool = False
    dense_layers: int = 0
    shared_heads: bool = False
    group: Group = "mean"
    evict_every: int | None = 1

    def __post_init__(self) -> None:
        check_budget(self)
        for field in ("sinks", "dense_layers"):
            check_count(self, field)
        for field in ("pin_prompt", "shared_heads"):
            take_flag(self, field)
        if self.recent is not None:
            check_count(self, "recent")
        name, size = type(self).__name__, self.page_size
        check_group(name, self.group)
        if self.evict_every is not None:
            check_count(self, "evict_every", least=1)
            if self.evict_every > 1 and self.evict_every % size:
                raise SparsityError(
                    f"{name}(evict_every={self.evict_every}, page_size={size}): whole pages are "
                    f"evicted; use a multiple of {size}, or 1 for whenever a page is needed"
                )
        recent = self.recent_kept
        # Pages that the newest tokens can touch: one token lies in one page, two may lie in two.
        touched = -(-(recent - 1) // size) + 1 if recent else 0
        if -(-self.sinks // size) + touched >= self.budget // size:
            raise SparsityError(
                f"{name}(budget={self.budget}, page_size={size}, sinks={self.sinks}, "
                f"recent={recent}): what is protected leaves no room to choose; use a budget above "
                f"{(-(-self.sinks // size) + touched) * size}, fewer sinks, or "
                f"recent={self.budget // 4}"
            )

    @property
    def usual_recent(self) -> int:
        """Newest tokens protected where `recent` is None."""
        return 0

    @property
    def recent_kept(self) -> int:
        """Newest tokens protected: `recent`, or the policy's own number."""
        return self.usual_recent if self.recent is None else self.recent

    @property
    @override
    def evicts(self) -> bool:
        return True

    @property
    @override
    def keeps_sinks(self) -> bool:
        return self.sinks > 0 or self.pin_prompt

    @abstractmethod
    def worth(self, pages: PageView) -> Tensor:
        """Worth of each page, `[batch, kv_heads, P]`; the page with the least is evicted first.

        Sinks, recent tokens and pinned pages are protected whatever their worth.
        """

    @override
    def priority(self, pages: PageView) -> Tensor:
        """The worth, with sinks and recent tokens protected; see `Policy.priority`."""
        worth = self._over_heads(self.worth(pages))
        if self.sinks == self.recent_kept == 0:
            return worth.float()
        return worth.float().masked_fill(self._protected(pages), torch.inf)

    def tie_score(self, pages: PageView) -> Tensor | None:
        """What decides between pages of equal worth, `[batch, kv_heads, P]`: the least goes first.

        Not below 0, and read to 12 significant bits. None, the default, for age alone.
        """
        return None

    @override
    def tie(self, pages: PageView) -> Tensor | None:
        """`tie_score` but for rounding, and 0 for what is protected: of that the oldest goes."""
        score = self.tie_score(pages)
        if score is None:
            return None
        score = without_rounding(self._over_heads(score))
        return score.masked_fill(self._protected(pages), 0)

    def _protected(self, pages: PageView) -> Tensor:
        return pages.newest(self.recent_kept) | (pages.start < self.sinks)

    def _over_heads(self, numbers: Tensor) -> Tensor:
        """Numbers of pages, `[batch, kv_heads, P]`; their mean with `shared_heads`."""
        if self.shared_heads:
            return numbers.mean(1, keepdim=True).expand_as(numbers)
        return numbers
