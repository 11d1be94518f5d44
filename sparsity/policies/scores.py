"""Scores of pages and tokens that several policies share."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from sparsity.kernels import page_scores
from sparsity.policies.base import Group, PageView


def page_bounds(query: Tensor, kmin: Tensor, kmax: Tensor, group: Group) -> Tensor:
    """Upper bound of query . key over the keys of each page (Quest, arXiv 2406.10774).

    The bound is sum_i max(q_i * kmin_i, q_i * kmax_i), without scaling, reduced over the query
    heads that share a KV head.

    Args:
        query: `[batch, query_heads, head_dim]`.
        kmin: elementwise smallest key of each page, `[batch, kv_heads, P, head_dim]`.
        kmax: elementwise largest key of each page, `[batch, kv_heads, P, head_dim]`.
        group: "max" or "mean" over the query heads.

    Returns:
        float32 `[batch, kv_heads, P]`.
    """
    return page_scores.page_bounds(query, kmin, kmax, group)


def page_logits(query: Tensor, pages: PageView, group: Group) -> Tensor:
    """Highest query . key of each page, without scaling, reduced as in `page_bounds`.

    Args:
        query: `[batch, query_heads, head_dim]`.
        pages: of a policy that needs `tokens`.
        group: "max" or "mean" over the query heads.

    Returns:
        float32 `[batch, kv_heads, P]`, -inf for a page without tokens.
    """
    assert pages.keys is not None
    return page_scores.page_logits(query, pages.keys, pages.filled, pages.page_size, group)


def window_scores(pages: PageView, recent: int, kernel: int, pooling: Group) -> Tensor:
    """Mean attention of the last queries to each token, pooled over its neighbours.

    The neighbours of a token are the tokens held next to it by rank; beyond the ends are zeros, and
    so are the newest `recent` tokens, which are protected anyway.

    Args:
        pages: of a policy that needs a `window`.
        recent: newest tokens that count as zero.
        kernel: tokens pooled over, odd.
        pooling: "max" or "mean" of them.

    Returns:
        `[batch, kv_heads, N]`.
    """
    assert pages.window is not None
    rank = pages.rank
    scores = pages.window.mean(2).masked_fill(rank > pages.now - recent, 0)
    last = torch.iinfo(rank.dtype).max
    order = rank.masked_fill(~pages.filled, last).argsort(dim=-1, stable=True)
    scores = scores.gather(-1, order)
    if pooling == "max":
        scores = F.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    else:
        scores = F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    return scores.gather(-1, order.argsort(-1)).masked_fill(~pages.filled, 0)


def without_rounding(scores: Tensor) -> Tensor:
    """Scores to 12 significant bits, so that those that differ by rounding alone are equal.

    The values of a token that comes again are in the first layer those it had before, but computed
    in another forward they differ in the last bits, and then rounding would choose between them.

    Args:
        scores: none below 0.

    Returns:
        float32, of the same shape; NaN stays NaN.
    """
    scores = scores.float()
    bits = scores.view(torch.int32)  # 12 of the 24 bits of the significand go
    rounded = ((bits + (1 << 11)) & -(1 << 12)).view(torch.float32)
    return rounded.where(~scores.isnan(), scores)
