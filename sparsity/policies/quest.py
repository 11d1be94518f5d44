"""Quest: attend to the pages that can matter for this query."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    """Keep everything; attend to the current page and the pages with the highest score bound.

    Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference"
    (arXiv 2406.10774). Each page keeps the elementwise smallest and largest key, m and M. The
    score of a page is sum_i max(q_i * m_i, q_i * M_i), never below a true score q . k in it. A
    decoded token attends to the current page and the best `budget / page_size - 1` others, chosen
    anew for each token. A prompt is dense. Memory grows with the text: only the reading is sparse.

    Departures from the paper: one choice for each KV head (scores reduced over the query heads
    that share it) instead of one for each query head. From the authors' evaluation code: the
    current page is always attended to (their CUDA path does that too), and the number of pages
    has no floor of 3.

    budget: tokens attended to at each step. page_size: tokens a page (the paper's 16).
    dense_layers: first layers of the model left dense (the paper's 2). group: "max" or "mean".
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
    def evicts(self) -> bool:
        """Nothing is dropped."""
        return False

    @property
    def needs(self) -> Needs:
        """The bound is read from the summaries."""
        return Needs(summaries=True)

    def select(self, query: Tensor, pages: PageView) -> Tensor | None:
        """The current page and those with the highest bound."""
        count = self.budget // self.page_size
        if pages.start.shape[-1] <= count:
            return None
        assert pages.kmin is not None
        assert pages.kmax is not None
        bounds = page_bounds(query, pages.kmin, pages.kmax, self.group)
        bounds = bounds.masked_fill(pages.newest(1), torch.inf)
        return bounds.masked_fill(~pages.used, -torch.inf).topk(count, dim=-1).indices
