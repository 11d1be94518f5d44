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

BLOCK = 128  # keys whose similarities to all others are in memory at once


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
    def keeps_sinks(self) -> bool:
        return True  # what is attended to most is kept, unless another key is nearly the same

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

    All similarities of a key sum up to its product with the sum of all keys, so that only those of
    near-duplicates are looked for. Memory is linear in the number of keys. Waits for the device.

    Args:
        keys: `[batch, kv_heads, N, head_dim]`.
        start: rank of each key's token, -1 for none, `[batch, kv_heads, N]`.
        threshold: cosine similarity above which the newest near-duplicate is spared, at least 0.

    Returns:
        float32 or wider, `[batch, kv_heads, N]`.
    """
    used = start >= 0
    unit = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    unit = unit.masked_fill(~used[..., None], 0)
    total = (unit @ unit.sum(2)[..., None])[..., 0] - (unit * unit).sum(-1)
    newest_first = start.argsort(dim=-1, descending=True)
    index = newest_first[..., None].expand_as(unit)
    spared = _spared(unit.gather(2, index), used.gather(-1, newest_first), threshold)
    total = total - spared.gather(-1, newest_first.argsort(-1))
    count = used.sum(-1, keepdim=True).clamp(min=1)
    return (total / count).masked_fill(~used, -torch.inf).softmax(-1)


def _spared(unit: Tensor, used: Tensor, threshold: float) -> Tensor:
    """What is not counted of each key's similarities: those to the keys it is spared by.

    A key spares the first other key that it is more similar to than `threshold`. Most find one
    among the newest, so the keys are gone through in blocks, each with the keys that have found
    none so far.

    Args:
        unit: keys of length 1, newest first, `[batch, kv_heads, N, head_dim]`; 0 for none.
        used: whether there is a key, bool `[batch, kv_heads, N]`.
        threshold: at least 0, so that a key of length 0 is similar to none.

    Returns:
        `[batch, kv_heads, N]`.
    """
    spared, searching = torch.zeros_like(unit[..., 0]), used
    for first in range(0, unit.shape[2], BLOCK):
        rows = _first_true(searching)
        if rows.shape[-1] == 0:
            break
        block = unit[:, :, first : first + BLOCK]
        similar = _take_rows(unit, rows) @ block.mT
        own = (rows - first)[..., None]  # a key is no duplicate of itself
        inside, own = (own >= 0) & (own < block.shape[2]), own.clamp(0, block.shape[2] - 1)
        similar.scatter_(-1, own, similar.gather(-1, own).masked_fill_(inside, 0))
        found = (similar > threshold).any(-1) & searching.gather(-1, rows)
        searching = searching.scatter(-1, rows, searching.gather(-1, rows) & ~found)
        finding = _first_true(found)
        similar, found = _take_rows(similar, finding), found.gather(-1, finding)
        place = torch.arange(block.shape[2], device=unit.device)
        nearest = (similar > threshold).to(torch.int8).argmax(-1, keepdim=True)
        chosen = (place == nearest) & found[..., None]
        spared[:, :, first : first + BLOCK] = similar.masked_fill(~chosen, 0).sum(2)
    return spared


def _first_true(flags: Tensor) -> Tensor:
    """Where `flags`, bool `[batch, kv_heads, n]`, are True: int64 `[batch, kv_heads, most of any]`.

    Where fewer are True, places of others follow.
    """
    most = int(flags.sum(-1).max())
    return flags.to(torch.int8).argsort(dim=-1, descending=True)[..., :most]


def _take_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """`tokens` `[batch, kv_heads, n, d]` at `rows` `[batch, kv_heads, K]`."""
    return tokens.gather(2, rows[..., None].expand(-1, -1, -1, tokens.shape[-1]))
