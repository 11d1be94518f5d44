"""Scores of pages against the query of one new token: the bound of Quest, and the exact one."""

import torch
from torch import Tensor

from sparsity.kernels.available import launch, serves
from sparsity.policies.base import Group, reduce_group


def page_bounds(query: Tensor, kmin: Tensor, kmax: Tensor, group: Group) -> Tensor:
    """Upper bound of query . key over the keys of each page, without scaling.

    Args:
        query: `[batch, query_heads, head_dim]`.
        kmin: elementwise smallest key of each page, `[batch, kv_heads, P, head_dim]`.
        kmax: elementwise largest key of each page, `[batch, kv_heads, P, head_dim]`.
        group: "max" or "mean" over the query heads that share a KV head.

    Returns:
        float32 `[batch, kv_heads, P]`.
    """
    if not serves(kmin):
        return page_bounds_reference(query, kmin, kmax, group)
    from sparsity.kernels.page_scores_triton import page_bounds_op

    bounds: Tensor = launch("page_bounds", page_bounds_op, query, kmin, kmax, group)
    return bounds


def page_bounds_reference(query: Tensor, kmin: Tensor, kmax: Tensor, group: Group) -> Tensor:
    """`page_bounds` in plain torch: sum_i max(q_i * kmin_i, q_i * kmax_i)."""
    batch, kv_heads, _, head_dim = kmin.shape
    grouped = query.reshape(batch, kv_heads, -1, head_dim).float()
    bounds = torch.einsum("bhgd,bhpd->bhgp", grouped.clamp(min=0), kmax.float())
    bounds = bounds + torch.einsum("bhgd,bhpd->bhgp", grouped.clamp(max=0), kmin.float())
    return reduce_group(bounds, group)


def page_logits(
    query: Tensor, keys: Tensor, filled: Tensor, page_size: int, group: Group
) -> Tensor:
    """Highest query . key of each page, without scaling.

    Args:
        query: `[batch, query_heads, head_dim]`.
        keys: `[batch, kv_heads, N, head_dim]`, N = P * page_size.
        filled: True where there is a token; bool `[batch, kv_heads, N]`.
        page_size: tokens a page.
        group: "max" or "mean" over the query heads that share a KV head.

    Returns:
        float32 `[batch, kv_heads, P]`, -inf for a page without tokens.
    """
    if not serves(keys, page_size):
        return page_logits_reference(query, keys, filled, page_size, group)
    from sparsity.kernels.page_scores_triton import page_logits_op

    args = (query, keys, filled, page_size, group)
    logits: Tensor = launch("page_logits", page_logits_op, *args)
    return logits


def page_logits_reference(
    query: Tensor, keys: Tensor, filled: Tensor, page_size: int, group: Group
) -> Tensor:
    """`page_logits` in plain torch."""
    batch, kv_heads, _, head_dim = keys.shape
    grouped = query.reshape(batch, kv_heads, -1, head_dim).float()
    logits = torch.einsum("bhgd,bhnd->bhgn", grouped, keys.float())
    logits = logits.masked_fill(~filled[:, :, None], -torch.inf)
    return reduce_group(logits.unflatten(-1, (-1, page_size)).amax(-1), group)
