"""RaaS: evict the page that has mattered to no recent step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.errors import SparsityError
from sparsity.policy import Group, PageView, Policy, check_budget, check_count, check_group
from sparsity.scores import page_bounds


@dataclass(frozen=True)
class RaaS(Policy):
    """Keep `budget` tokens in pages; evict the page whose time stamp is oldest.

    Hu et al., "RaaS: Reasoning-Aware Attention Sparsity for Efficient LLM Reasoning"
    (arXiv 2502.11147, Findings of ACL 2025). The score of a retained page is Quest's bound, scaled
    as attention scales it and put through a softmax over the retained pages. After each forward a
    page with score above `alpha` gets the current time as its stamp (or, with `top_ratio`, the
    best `top_ratio` of the pages do). A new page is stamped when it is opened. When a page is
    needed and `budget` tokens are in use, the page with the oldest stamp is evicted (of equals the
    oldest page), for each KV head on its own. The page of the newest token stays; so does the
    prompt. Attention runs over everything retained: time and memory are O(budget).

    Departures from the paper: decisions for each KV head, scores reduced over the query heads that
    share it. After a forward of several tokens the newest token's query refreshes the stamps
    before anything is evicted. The scale is the model's own (head_dim ** -0.5 for most).
    Departures from the authors' code: the prompt is pinned (there it is not; `pin_prompt=False`
    does the same), the softmax runs over all retained pages on scaled scores (there over the top
    pages, unscaled), evicted memory is really freed, and no layer is dense by default (there the
    first two for Llama).

    budget: tokens kept by a KV head, the pinned ones included. page_size: tokens a page (16).
    alpha: a page scoring above is refreshed (the paper's 1e-4; the default when `top_ratio` is
        not given). top_ratio: share of the retained pages to refresh, at least one page; the
        paper finds 0.5 about equal to its alpha. One of the two, not both.
    pin_prompt: never evict pages with a token that came in a forward of several.
    dense_layers: first layers of the model that keep everything. group: "max" or "mean".
    """

    budget: int
    page_size: int = 16
    alpha: float | None = None
    top_ratio: float | None = None
    pin_prompt: bool = True
    dense_layers: int = 0
    group: Group = "max"

    def __post_init__(self) -> None:
        check_budget("RaaS", self.budget, self.page_size)
        check_count("RaaS", "dense_layers", self.dense_layers)
        check_group("RaaS", self.group)
        if self.alpha is not None and self.top_ratio is not None:
            raise SparsityError(
                f"RaaS(alpha={self.alpha}, top_ratio={self.top_ratio}): give one of the two; "
                "they are two ways to choose the pages to refresh"
            )
        if self.alpha is None and self.top_ratio is None:
            object.__setattr__(self, "alpha", 1e-4)
        if self.alpha is not None and not 0 <= self.alpha < 1:
            raise SparsityError(f"RaaS(alpha={self.alpha}): expected a share in [0, 1)")
        if self.top_ratio is not None and not 0 < self.top_ratio <= 1:
            raise SparsityError(f"RaaS(top_ratio={self.top_ratio}): expected a share in (0, 1]")

    @property
    def evicts(self) -> bool:
        """Pages with the oldest stamps are dropped."""
        return True

    @property
    def summaries(self) -> bool:
        """The scores need them."""
        return True

    def priority(self, pages: PageView) -> Tensor:
        """The stamp."""
        return pages.stamp.float()

    def observe(self, query: Tensor, pages: PageView, scaling: float) -> Tensor:
        """Stamp the pages that matter to this query with the current time."""
        assert pages.kmin is not None
        assert pages.kmax is not None
        bounds = page_bounds(query, pages.kmin, pages.kmax, self.group) * scaling
        bounds = bounds.masked_fill(~pages.used, -torch.inf)
        if self.alpha is not None:
            refresh = bounds.softmax(-1) > self.alpha
        else:
            assert self.top_ratio is not None
            refresh = _top(bounds, pages, self.top_ratio)
        return torch.where(refresh & pages.used, pages.now, pages.stamp)


def _top(bounds: Tensor, pages: PageView, ratio: float) -> Tensor:
    """The best `ratio` of the used pages, at least one; of equals the newer page."""
    by_age = pages.start.argsort(dim=-1, descending=True, stable=True)
    by_score = bounds.gather(-1, by_age).argsort(dim=-1, descending=True, stable=True)
    place = by_age.gather(-1, by_score).argsort(-1)
    count = (pages.used.sum(-1, keepdim=True) * ratio).floor().clamp(min=1)
    return place < count
