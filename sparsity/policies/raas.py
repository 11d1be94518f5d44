"""RaaS: evict the page that has not mattered for longest."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from sparsity.arguments import take_share
from sparsity.errors import SparsityError
from sparsity.kernels.top_pages import top_pages
from sparsity.policies.base import Group, Needs, PageView, check_choice
from sparsity.policies.evicting import Evicting
from sparsity.policies.scores import page_bounds, page_logits


@dataclass(frozen=True)
class RaaS(Evicting):
    """Keep `budget` tokens in pages; evict the page whose time stamp is oldest.

    Hu et al., "RaaS: Reasoning-Aware Attention Sparsity for Efficient LLM Reasoning" (arXiv
    2502.11147, Findings of ACL 2025). The score of a page is Quest's bound, scaled as attention
    scales it and put through a softmax over the pages held. After each forward every page with a
    score above `alpha` is stamped with the current time (or, with `top_ratio`, the best `top_ratio`
    of the pages are). A new page is stamped when it is opened. When a page is needed and `budget`
    tokens are held, the page with the oldest stamp is evicted (of equals see `ties`), for each
    KV head on its own. The page of the newest token is never evicted, nor is the prompt. Attention
    runs over all pages held: time a token and memory are O(budget).

    Departures from the paper: each KV head decides on its own, by scores reduced over the query
    heads that share it. After a forward of several tokens the newest token's query refreshes the
    stamps before anything is evicted. The scaling is the model's own (head_dim ** -0.5 for most).
    Departures from the authors' code: the prompt is pinned (there it is not; `pin_prompt=False`
    does the same), the softmax runs over all pages held on scaled scores (there over the top pages,
    unscaled), evicted memory is really freed, and no layer is dense by default (there the first two
    for Llama).

    The prompt is pinned by default, as in the paper. On long texts behind a prompt of 64 tokens
    ``sinks=4, pin_prompt=False`` loses 0.013 nats a token less at a budget of 256; of problems
    whose sentences are needed until the end 0.24 are solved at 512 with the prompt pinned, and 0.09
    with four sinks in its place (docs/retention.md).

    Args:
        alpha: score above which a page is stamped anew; the paper's 1e-4, the default where
            `top_ratio` is not given.
        top_ratio: share of the pages held that are stamped anew, at least one page; the paper finds
            0.5 about equal to its alpha. Give `alpha` or `top_ratio`, not both.
        score: "bound" is Quest's bound; "exact" the highest true score in the page, which costs
            reading every key held once more.
        attend: "all" attends to all pages held (the paper). "top" attends to the newest page and
            the best others, `top_ratio` of the budget in all (half of it where `alpha` is given);
            the authors' evaluation code attends to the top budget / page_size pages, which is
            nearly all.
        ties: which of the pages with the oldest stamp goes first, which the paper leaves open:
            "age" the oldest, "score" the one with the lowest score for the newest query. At the
            paper's alpha most pages have the same stamp, the newest.

    The other arguments are those of `Evicting`, with page_size=16, pin_prompt=True and group="max".
    """

    page_size: int = 16
    pin_prompt: bool = True
    group: Group = "max"
    alpha: float | None = None
    top_ratio: float | None = None
    score: Literal["bound", "exact"] = "bound"
    attend: Literal["all", "top"] = "all"
    ties: Literal["age", "score"] = "age"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.alpha is not None and self.top_ratio is not None:
            raise SparsityError(
                f"{name}(alpha={self.alpha}, top_ratio={self.top_ratio}): give one of the two; "
                "they are two ways to choose the pages to refresh"
            )
        if self.alpha is not None:
            take_share(self, "alpha")
        if self.top_ratio is not None:
            take_share(self, "top_ratio", above=True)
        check_choice(name, "score", self.score, ("bound", "exact"))
        check_choice(name, "attend", self.attend, ("all", "top"))
        check_choice(name, "ties", self.ties, ("age", "score"))

    @property
    def threshold(self) -> float:
        """The score above which a page is stamped anew where no `top_ratio` is given."""
        return 1e-4 if self.alpha is None else self.alpha

    def threshold_of(self, pages: PageView) -> Tensor | float:
        """`threshold`; a policy that derives from this one may look at the pages held."""
        return self.threshold

    @property
    @override
    def needs(self) -> Needs:
        return Needs(
            summaries=self.score == "bound",
            tokens=self.score == "exact",
            sums=1 if self.ties == "score" else 0,
        )

    @override
    def worth(self, pages: PageView) -> Tensor:
        return pages.stamp.float()

    @override
    def tie_score(self, pages: PageView) -> Tensor | None:
        return pages.sums[..., 0] if self.ties == "score" else None

    @override
    def observe(self, query: Tensor, pages: PageView, scaling: float) -> PageView:
        """Stamp the pages that matter to this query with the rank of the newest token.

        With ties="score" the sum of a page is its score.
        """
        scores = self.scores(query, pages) * scaling
        ratio, shares = self.top_ratio, None
        if ratio is None or self.ties == "score":
            shares = scores.softmax(-1)  # an unused place has 0
        if ratio is not None:
            refresh = _top(scores, pages, ratio) & pages.used
        else:
            assert shares is not None
            refresh = shares > self.threshold_of(pages)
        stamp = torch.where(refresh, pages.now.to(pages.stamp.dtype), pages.stamp)
        if self.ties == "age":
            return replace(pages, stamp=stamp)
        assert shares is not None
        return replace(pages, stamp=stamp, sums=shares[..., None].to(pages.sums.dtype))

    @override
    def select(self, query: Tensor, pages: PageView) -> Tensor | None:
        """All pages, or with attend="top" the newest page and those with the highest score."""
        count = max(1, math.floor(self.budget // self.page_size * (self.top_ratio or 0.5)))
        if self.attend == "all" or pages.start.shape[-1] <= count:
            return None
        scores = self.scores(query, pages).masked_fill(pages.newest(1), torch.inf)
        return top_pages(scores, count)

    def scores(self, query: Tensor, pages: PageView) -> Tensor:
        """Unscaled score of each page, -inf for unused places: float32 `[batch, kv_heads, P]`."""
        if self.score == "exact":
            return page_logits(query, pages, self.group)
        assert pages.kmin is not None
        assert pages.kmax is not None
        bounds = page_bounds(query, pages.kmin, pages.kmax, self.group)
        return bounds.masked_fill(~pages.used, -torch.inf)


def _top(scores: Tensor, pages: PageView, ratio: float) -> Tensor:
    """True for the best `ratio` of the used pages, at least one; of equals the newer page."""
    by_age = pages.start.argsort(dim=-1, descending=True, stable=True)
    by_score = scores.gather(-1, by_age).argsort(dim=-1, descending=True, stable=True)
    order = by_age.gather(-1, by_score).argsort(-1)
    count = (pages.used.sum(-1, keepdim=True) * ratio).floor().clamp(min=1)
    return order < count
