"""R-KV: important and not redundant."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from sparsity.arguments import take_share
from sparsity.policies.base import Group, Needs, PageView, check_count
from sparsity.policies.evicting import Evicting
from sparsity.policies.scores import window_scores
from sparsity.policies.snapkv import check_kernel

BLOCK = 256  # tokens whose similarities to all others are in memory at once


@dataclass(frozen=True)
class RKV(Evicting):
    """Keep tokens that the last queries attend to and whose keys say what no other key says.

    Cai et al., "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models"
    (arXiv 2505.24133). Whenever `evict_every` tokens (the paper's buffer) have come on top of the
    budget, tokens are ranked by Z = mix * importance - (1 - mix) * redundancy and the best stay,
    with the newest `window`. Importance: mean attention of the last `window` queries, pooled by
    maximum over `kernel` neighbours. Redundancy: mean cosine similarity of the token's key to the
    other keys held, put through a softmax; where two keys are more similar than `threshold`, the
    similarity is not held against the newest key that the other is so similar to.

    Departures from the paper: one choice for each KV head. From the authors' code: weights are
    normalised before the maximum over the query heads that share a KV head (there after), and over
    the window's own tokens too; a key that is similar to none spares none (there the first token).
    The prompt is compressed like the rest.

    Beyond the knobs of `Evicting`: evict_every: the paper's buffer, 128. window: queries that
    observe (the paper's 8). recent: newest tokens kept; None for the window. mix: the paper's
    lambda, 0.1 (0.07 in the code). kernel: 7, as in the code. threshold: 0.5, as in the code.
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
    def usual_recent(self) -> int:
        """The window."""
        return self.window

    @property
    def needs(self) -> Needs:
        """The last queries, and the keys."""
        return Needs(window=self.window, tokens=True, group=self.group)

    def worth(self, pages: PageView) -> Tensor:
        """Z."""
        assert pages.keys is not None
        importance = window_scores(pages, self.recent_kept, self.kernel, "max")
        redundancy = redundancies(pages.keys, pages.start, self.threshold)
        return self.mix * importance - (1 - self.mix) * redundancy.to(importance.dtype)


def redundancies(keys: Tensor, start: Tensor, threshold: float) -> Tensor:
    """Softmax over the mean similarities of each key to all others, `[batch, kv_heads, N]`.

    keys: `[batch, kv_heads, N, head_dim]`. start: rank of each, -1 for none. Memory is linear in
    the number of keys: similarities are taken in blocks.
    """
    used = start >= 0
    unit = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    unit = unit.masked_fill(~used[..., None], 0)
    total = torch.zeros_like(unit[..., 0])
    place = torch.arange(start.shape[-1], device=keys.device)
    for first in range(0, start.shape[-1], BLOCK):
        rows = place[first : first + BLOCK, None]
        similar = unit[:, :, first : first + BLOCK] @ unit.mT
        similar = similar.masked_fill(rows == place, 0)
        close = (similar > threshold) & used[:, :, None]
        newest = start[:, :, None].masked_fill(~close, -1).max(-1, keepdim=True)
        spared = (newest.values >= 0) & (place == newest.indices)
        total = total + similar.masked_fill(spared, 0).sum(2)
    count = used.sum(-1, keepdim=True).clamp(min=1)
    return (total / count).masked_fill(~used, -torch.inf).softmax(-1)
