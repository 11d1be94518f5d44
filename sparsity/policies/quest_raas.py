"""Quest on the pages of the prompt, RaaS on the pages that are decoded."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from sparsity.errors import SparsityError
from sparsity.kernels.top_pages import top_pages
from sparsity.policies.base import PageView, check_budget
from sparsity.policies.raas import RaaS


@dataclass(frozen=True)
class QuestRaaS(RaaS):
    """Keep the prompt whole and attend to its best pages; keep decoded pages as `RaaS` does.

    The combination that the authors of RaaS advise for small budgets (arXiv 2502.11147), where a
    pinned prompt leaves no room for decoded pages. Decoded pages are kept as by `RaaS`, `budget`
    tokens of them, and all are attended to. Pages of the prompt are never evicted and do not count
    against the budget; a decoded token attends to those with the highest Quest bound (arXiv
    2406.10774), `prompt_budget` tokens of them, and to more while fewer than `budget` decoded
    tokens are held. Time a token is O(budget + prompt_budget), memory O(prompt + budget).

    The paper gives no details. Ours are how the two share a step, and that stamps are refreshed by
    the scores of one softmax over prompt and decoded pages. A page that holds both the end of a
    prompt and the first decoded tokens belongs to the prompt, but is always attended to while it is
    the newest page.

    Args:
        budget: decoded tokens kept.
        prompt_budget: prompt tokens attended to, at least; at 1,024 the paper finds both methods
            close to dense attention.

    The other arguments are those of `RaaS`.
    """

    pin_prompt: bool = field(default=True, init=False)
    pins_count: bool = field(default=False, init=False)
    attend: Literal["all", "top"] = field(default="all", init=False)
    prompt_budget: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self, "prompt_budget")
        if self.evict_every is None:
            raise SparsityError(
                "QuestRaaS(evict_every=None): decoded tokens are what it evicts; use 1, or a "
                f"multiple of page_size={self.page_size}"
            )

    @override
    def select(self, query: Tensor, pages: PageView) -> Tensor | None:
        """The newest page, all decoded pages, and the best pages of the prompt."""
        assert self.pages_held is not None
        count = self.prompt_budget // self.page_size + self.pages_held
        if pages.start.shape[-1] <= count:
            return None
        scores = self.scores(query, pages)
        scores = scores.masked_fill((pages.used & ~pages.pinned) | pages.newest(1), torch.inf)
        return top_pages(scores, count)
