"""Scores of whole pages, read from their key summaries."""

import torch
from torch import Tensor

from sparsity.policy import Group


def page_bounds(query: Tensor, kmin: Tensor, kmax: Tensor, group: Group) -> Tensor:
    """Upper bound of query . key over the keys of each page (Quest, arXiv 2406.10774).

    The bound is sum_i max(q_i * kmin_i, q_i * kmax_i), unscaled, computed in float32, reduced over
    the query heads that share a KV head.

    query: `[batch, query_heads, head_dim]`; kmin, kmax: `[batch, kv_heads, P, head_dim]`.
    Returns float32 `[batch, kv_heads, P]`.
    """
    batch, kv_heads, _, head_dim = kmin.shape
    grouped = query.reshape(batch, kv_heads, -1, head_dim).float()
    bounds = torch.einsum("bhgd,bhpd->bhgp", grouped.clamp(min=0), kmax.float())
    bounds = bounds + torch.einsum("bhgd,bhpd->bhgp", grouped.clamp(max=0), kmin.float())
    return bounds.amax(2) if group == "max" else bounds.mean(2)
