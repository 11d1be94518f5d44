"""StreamingLLM: attention sinks and a rolling window."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from typing_extensions import override

from sparsity.policies.base import Group, Needs, PageView, check_choice
from sparsity.policies.evicting import Evicting


@dataclass(frozen=True)
class StreamingLLM(Evicting):
    """Keep the first `sinks` tokens of a row and its newest `budget - sinks` tokens.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).
    After token t the tokens kept are {0, ..., sinks - 1} and {t - (budget - sinks) + 1, ..., t}.
    Positions are those inside the cache (section 3.2): of n tokens held the sinks have positions 0
    to sinks - 1 and the newest token, whose query attends, has n - 1. However long the text, no
    position is beyond the budget, so that a model can go on past the length it was trained for.

    Departures from the paper: keys are cached with the rotation of their position in the text, and
    only the sinks are rotated further, to where they are as far from the query as inside the cache;
    attention with rotary positions depends on that distance alone. Within the prompt every token
    attends to all before it, at positions of the text; the paper's models have a rolling window
    there too. The sinks move from the first eviction on: for later chunks of a prompt
    (`prefill_chunk_size`) and later turns, which attend to all that is held and all that they
    bring, and while decoding. Sinks are a row's first real tokens, so that left padding changes
    nothing.

    Args:
        budget: tokens kept, sinks included.
        sinks: first tokens kept; the paper's 4.
        positions: "cache" (the paper) needs a model whose rotation `SparseCache` can verify, by a
            forward of five tokens when the cache is made. "absolute" keeps every key at its
            position in the text, as all other policies do, and works with any model.
    """

    sinks: int = 4
    page_size: int = field(default=1, init=False)
    recent: int | None = field(default=0, init=False)
    pin_prompt: bool = field(default=False, init=False)
    shared_heads: bool = field(default=False, init=False)
    group: Group = field(default="mean", init=False)
    positions: Literal["cache", "absolute"] = "cache"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("StreamingLLM", "positions", self.positions, ("cache", "absolute"))

    @property
    @override
    def needs(self) -> Needs:
        return Needs(moved=self.sinks if self.positions == "cache" else 0)

    @override
    def worth(self, pages: PageView) -> Tensor:
        return pages.start.float()
