"""R-KV: keep tokens that are important and not redundant."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from typing_extensions import override

from sparsity.arguments import take_share
from sparsity.policies.base import Group, Needs, PageView, check_count
from sparsity.policies.evicting import Evicting
from sparsity.policies.scores import window_scores
from sparsity.policies.snapkv import check_kernel

BLOCK = 256  # tokens whose similarities to all others are in memory at once


@dataclass(frozen=True)
class RKV(Evicting):
    """Keep tokens that the last queries attend to and whose keys resemble no other key.

    Cai et al., "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models" (arXiv
    2505.24133). Whenever `evict_every` tokens (the paper's buffer) have come on top of the budget,
    the worth of a token is mix * importance - (1 - mix) * redundancy, and the best are kept, with
    the newest `window`. Importance is the mean attention of the last `window` queries, pooled by
    maximum over `kernel` neighbours. Redundancy is the mean cosine similarity of the token's key to
    the other keys held, put through a softmax over the tokens. Where two keys are more similar than
    `threshold`, the similarity does not count against the newest of the keys that a key is so
    similar to.

    Departures from the paper: each KV head decides on its own. From the authors' code: weights are
    normalised before the maximum over the query heads that share a KV head (there after), and over
    the window's own tokens too; a key that is similar to none spares none (there the first token).
    The prompt is compressed like the rest.

    Args:
        recent: newest tokens that are protected; None for `window`.
        evict_every: the paper's buffer, 128 tokens.
        window: last queries that decide; the paper's 8.
        mix: the paper's lambda, 0.1 (0.07 in the authors' code).
        kernel: tokens pooled over, odd; 7 as in the authors' code.
        threshold: cosine similarity above which keys are near-duplicates; 0.5 as in the authors'
            code.

    The other arguments are those of `Evicting`, with page_size=1 and group="max".
    """

    page_size: int = field(default=1, init=False)
    recent: int | None = None
    group: Group = "max"
    evict_every: int | None = 128
    window: int = 8
    mix: float = 0.1
    kernel: int = 7
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_count(self, "window", least=1)
        check_kernel(self)
        take_share(self, "mix", above=True)
        take_share(self, "threshold")
        super().__post_init__()

    @property
    @override
    def usual_recent(self) -> int:
        return self.window

    @property
    @override
    def needs(self) -> Needs:
        return Needs(window=self.window, tokens=True, group=self.group)

    @override
    def worth(self, pages: PageView) -> Tensor:
        assert pages.keys is not None
        importance = window_scores(pages, self.recent_kept, self.kernel, "max")
        redundancy = redundancies(pages.keys, pages.start, self.threshold)
        return self.mix * importance - (1 - self.mix) * redundancy.to(importance.dtype)


def redundancies(keys: Tensor, start: Tensor, threshold: float) -> Tensor:
    """Mean similarity of each key to all others, put through a softmax over the keys.

    Memory is linear in the number of keys: similarities are computed in blocks.

    Args:
        keys: `[batch, kv_heads, N, head_dim]`.
        start: rank of each key's token, -1 for none, `[batch, kv_heads, N]`.
        threshold: cosine similarity above which the newest near-duplicate is spared.

    Returns:
        float32 or wider, `[batch, kv_heads, N]`.
    """
    used = start >= 0
    unit = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    unit = unit.masked_fill(~used[..., None], 0)
    total = torch.zeros_like(unit[..., 0])
    index = torch.arange(start.shape[-1], device=keys.device)
    for first in range(0, start.shape[-1], BLOCK):
        own = index[first : first + BLOCK, None]
        similar = unit[:, :, first : first + BLOCK] @ unit.mT
        similar = similar.masked_fill(own == index, 0)
        close = (similar > threshold) & used[:, :, None]
        newest = start[:, :, None].masked_fill(~close, -1).max(-1, keepdim=True)
        spared = (newest.values >= 0) & (index == newest.indices)
        total = total + similar.masked_fill(spared, 0).sum(2)
    count = used.sum(-1, keepdim=True).clamp(min=1)
    return (total / count).masked_fill(~used, -torch.inf).softmax(-1)
