"""Random eviction: the baseline that a score has to beat."""

from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from sparsity.errors import SparsityError
from sparsity.policy import PageView, Policy, check_budget, check_count

_LOW32 = 0xFFFFFFFF
_Bits = TypeVar("_Bits", int, Tensor)


@dataclass(frozen=True)
class Random(Policy):
    """Evict a token drawn uniformly, for each KV head on its own; keep the prompt by default.

    "Random Attention" (arXiv 2609.03430) reports that eviction at random with the prompt kept is a
    strong baseline for reasoning. Each time room is needed, one token is drawn among those that
    are neither pinned nor among the newest `recent`; when no such token is left, the oldest of the
    recent ones goes.

    Departures from the paper: tokens go one at a time, exactly when room is needed. Draws come
    from a hash of (seed, layer, KV head, token, step) and not from a generator with a state, so a
    row's result depends neither on the rest of its batch nor on padding, and `reset` starts the
    same draws again; the rows of one batch share their draws.

    budget: tokens kept. pin_prompt: never evict what came in forwards of several tokens.
    recent: newest tokens that are not drawn (no default was found in the paper).
    seed: changes the draws.
    """

    budget: int
    pin_prompt: bool = True
    recent: int = 16
    seed: int = 0
    page_size: int = field(default=1, init=False)
    dense_layers: int = 0

    def __post_init__(self) -> None:
        check_budget("Random", self.budget, self.page_size)
        check_count("Random", "recent", self.recent)
        check_count("Random", "seed", self.seed)
        check_count("Random", "dense_layers", self.dense_layers)
        if self.recent >= self.budget:
            raise SparsityError(
                f"Random(budget={self.budget}, recent={self.recent}): the recent window must be "
                f"smaller than the budget; use recent={self.budget // 4} or a larger budget"
            )

    @property
    def evicts(self) -> bool:
        """Drawn tokens are dropped."""
        return True

    def priority(self, pages: PageView) -> Tensor:
        """A uniform draw in [0, 1) for each token; recent tokens rank above it, by age."""
        heads = torch.arange(pages.start.shape[1], device=pages.start.device)[None, :, None]
        token = pages.start.long()
        draw = _mix(_mix(self.seed * 0x9E3779B1 + pages.layer) + heads)
        draw = _mix(draw ^ (token & _LOW32))
        draw = _mix(draw ^ (pages.now.long() & _LOW32))
        uniform = (draw >> 8).float() / 2**24
        return torch.where(token > pages.now - self.recent, 1.0 + token.float(), uniform)


def _mix(value: _Bits) -> _Bits:
    """Murmur3's 32-bit finaliser: every input bit changes every output bit (int64 may wrap)."""
    value = value & _LOW32
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _LOW32
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _LOW32
    return value ^ (value >> 16)
