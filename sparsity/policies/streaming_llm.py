"""StreamingLLM: attention sinks and a rolling window."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsity.errors import SparsityError
from sparsity.policy import PageView, Policy, check_budget, check_count


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keep the first `sinks` tokens of a row and its most recent `budget - sinks` tokens.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).
    The kept set after token t is {0, ..., sinks - 1} and {t - (budget - sinks) + 1, ..., t}.

    Departures from the paper: positions are absolute, each key keeps the rotation of its place in
    the text, while the paper re-numbers positions inside the cache (equal until the text is longer
    than the model was trained for). During the prompt every token attends to all before it; the
    paper's models see a rolling window there too. Sinks are counted from the row's first real
    token, so left padding changes nothing.

    budget: tokens kept, sinks included. sinks: first tokens kept (the paper's 4).
    """

    budget: int
    sinks: int = 4
    page_size: int = field(default=1, init=False)
    dense_layers: int = 0
    pin_prompt: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_budget("StreamingLLM", self.budget, self.page_size)
        check_count("StreamingLLM", "sinks", self.sinks)
        check_count("StreamingLLM", "dense_layers", self.dense_layers)
        if self.sinks >= self.budget:
            raise SparsityError(
                f"StreamingLLM(budget={self.budget}, sinks={self.sinks}): the sinks leave no room "
                f"for recent tokens; use a budget above {self.sinks} or fewer sinks"
            )

    @property
    def evicts(self) -> bool:
        """Tokens between the sinks and the window are dropped."""
        return True

    def priority(self, pages: PageView) -> Tensor:
        """Age decides; sinks are protected."""
        return pages.start.float().masked_fill(pages.start < self.sinks, torch.inf)
