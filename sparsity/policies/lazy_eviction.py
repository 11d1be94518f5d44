"""LazyEviction: keep what comes back."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsity.arguments import take_share
from sparsity.policies.base import Group, Needs, PageView
from sparsity.policies.evicting import Evicting


@dataclass(frozen=True)
class LazyEviction(Evicting):
    """Keep tokens by how long they may stay silent before they matter again.

    Zhang et al., "LazyEviction: Lagged KV Eviction with Attention Pattern Observation for
    Efficient Long Reasoning" (arXiv 2506.15969). A token recurs when a query gives it more than
    `alpha` of its attention; the longest span between two recurrences is its maximum recurrence
    interval, MRI. With t steps since the last, its worth is
    2 / (1 + exp(1 + t / MRI)) + 2 / (1 + exp(MRI - 1)), and 0 if it never recurred. Every
    `evict_every` tokens (the paper's window W) those with the least worth are evicted, down to the
    budget; the newest W stay.

    Departures from the paper: one choice for each KV head, weights reduced over the query heads
    that share it. Of a prompt only the last query is observed, and the first span of a token is
    counted from when it came. "Never recurred" is read as worth 0 for the whole sum.

    Beyond the knobs of `Evicting`: evict_every: W, by task 101 (GSM8k), 175 (MATH, the default)
    or 363 (AIME). recent: newest tokens kept; None for W. alpha: the paper's 1e-4. page_size: with
    more than one token a page, its attention is the sum of its tokens'.
    """

    recent: int | None = None
    group: Group = "max"
    evict_every: int | None = 175
    alpha: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        take_share(self, "alpha")

    @property
    def usual_recent(self) -> int:
        """W."""
        return self.evict_every or 0

    @property
    def needs(self) -> Needs:
        """The newest query's weights; the interval is a sum, the last recurrence the stamp."""
        return Needs(attention="newest", sums=1, group=self.group)

    def observe(self, query: Tensor, pages: PageView, scaling: float) -> PageView:
        """Note what recurs, and after how long."""
        assert pages.weights is not None
        recurs = (pages.total(pages.weights) > self.alpha) & pages.used
        interval = torch.where(recurs, pages.now - pages.stamp, 0).to(pages.sums.dtype)
        return replace(
            pages,
            stamp=torch.where(recurs, pages.now.to(pages.stamp.dtype), pages.stamp),
            sums=pages.sums.maximum(interval[..., None]),
        )

    def worth(self, pages: PageView) -> Tensor:
        """By the last recurrence and the longest interval."""
        longest = pages.sums[..., 0].double()  # in float32 a sigmoid depends on the vector unit
        silent = (pages.now - pages.stamp) / longest.clamp(min=1)
        worth = 2 * torch.sigmoid(-1 - silent) + 2 * torch.sigmoid(1 - longest)
        return worth.masked_fill(longest == 0, 0)
