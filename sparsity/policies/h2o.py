"""H2O: heavy hitters and the recent."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from sparsity.policies.base import Needs, PageView, check_choice
from sparsity.policies.evicting import Evicting


@dataclass(frozen=True)
class H2O(Evicting):
    """Keep the tokens with the most attention so far, and the recent ones: half the budget each.

    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
    Models" (arXiv 2306.14048). Each token sums up the attention it was given by every query since
    it came, its own and those of the prompt included; a query's weights go over what was held at
    its time. When room is needed the token with the least sum is evicted (of equals the oldest),
    among those that are not among the newest `recent`.

    Raw sums favour tokens that have been there for longer. With ``normalise="age"`` the sum is
    divided by the tokens that have come since the token did, itself included, and while decoding
    the one that room is being made for, too: its query has said nothing yet, so that the youngest
    tokens count for a little less than their mean.

    Departures from the paper: one decision for each KV head, weights averaged over the query heads
    that share it. In a prompt the sums run over all of its queries, each over all tokens before
    it, and tokens are evicted once, at its end (the paper evicts token by token). Of a cache that
    is taken over with `past=`, the queries are gone and count as zero. From the authors' code:
    the sums of an evicted token are gone with it, and its memory is free.

    Beyond the knobs of `Evicting`: recent: None for half the budget (the paper's split).
    page_size: with more than one token a page, its sum is that of its tokens.
    normalise: "none" (the paper) or "age".
    """

    recent: int | None = None
    normalise: Literal["none", "age"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("H2O", "normalise", self.normalise, ("none", "age"))

    @property
    def usual_recent(self) -> int:
        """Half the budget."""
        return self.budget // 2

    @property
    def needs(self) -> Needs:
        """The weights of every query, and one sum."""
        return Needs(attention="all", sums=1, group=self.group)

    def observe(self, query: Tensor, pages: PageView, scaling: float) -> PageView:
        """Add this forward's attention."""
        assert pages.weights is not None
        return replace(pages, sums=pages.sums + pages.total(pages.weights)[..., None])

    def worth(self, pages: PageView) -> Tensor:
        """The sum, or the mean over the token's life."""
        if self.normalise == "none":
            return pages.sums[..., 0]
        return pages.sums[..., 0] / (pages.now - pages.start + 1)
