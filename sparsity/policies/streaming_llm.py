"""StreamingLLM: attention sinks and a rolling window."""

from dataclasses import dataclass, field

from torch import Tensor

from sparsity.knobs import Evicting
from sparsity.policy import Group, PageView


@dataclass(frozen=True)
class StreamingLLM(Evicting):
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

    sinks: int = 4
    page_size: int = field(default=1, init=False)
    recent: int | None = field(default=0, init=False)
    pin_prompt: bool = field(default=False, init=False)
    shared_heads: bool = field(default=False, init=False)
    group: Group = field(default="mean", init=False)

    def worth(self, pages: PageView) -> Tensor:
        """Age decides."""
        return pages.start.float()
