"""Quest: attend to the pages that can matter to the current query."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from sparsity.kernels.top_pages import top_pages
from sparsity.policies.base import (
    Group,
    Needs,
    PageView,
    Policy,
    check_budget,
    check_count,
    check_group,
)
from sparsity.policies.scores import page_bounds


@dataclass(frozen=True)
class Quest(Policy):
    """Keep everything; attend to the newest page and the pages with the highest score bound.

    Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference" (arXiv
    2406.10774). Each page keeps the elementwise smallest and largest key, m and M. The score of a
    page is sum_i max(q_i * m_i, q_i * M_i), which is never below the score q . k of one of its
    keys. A decoded token attends to the page it lies in and the best `budget / page_size - 1`
    others, chosen anew for each token. A prompt is attended to densely. Memory grows with the text:
    only reading is sparse.

    Departures from the paper: one choice for each KV head (scores reduced over the query heads that
    share it) instead of one for each query head. From the authors' evaluation code: the newest page
    is always attended to (as on their CUDA path), and the number of pages has no floor of 3.

    Args:
        budget: tokens attended to at each step.
        page_size: tokens a page; the paper's 16.
        dense_layers: this many first layers of the model are left dense; the paper's 2.
        group: "max" or "mean" over the query heads that share a KV head.
    """

    budget: int
    page_size: int = 16
    dense_layers: int = 2
    group: Group = "max"
    pin_prompt: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_budget(self)
        check_count(self, "dense_layers")
        check_group("Quest", self.group)

    @property
    @override
    def evicts(self) -> bool:
        return False

    @property
    @override
    def needs(self) -> Needs:
        return Needs(summaries=True)

    @override
    def select(self, query: Tensor, pages: PageView) -> Tensor | None:
        count = self.budget // self.page_size
        if pages.start.shape[-1] <= count:
            return None
        assert pages.kmin is not None
        assert pages.kmax is not None
        bounds = page_bounds(query, pages.kmin, pages.kmax, self.group)
        bounds = bounds.masked_fill(pages.newest(1), torch.inf)
        return top_pages(bounds.masked_fill(~pages.used, -torch.inf), count)
