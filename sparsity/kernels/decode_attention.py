"""Attention of one new token a row over the pages that are held, or over listed ones."""

import torch
from torch import Tensor

from sparsity.errors import SparsityError
from sparsity.kernels.available import demand, launch
from sparsity.policies.base import Group, reduce_group
from sparsity.retention.attention import attention_weights


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    now: Tensor,
    page_size: int,
    scaling: float,
    pages: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    weights: Group | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of the newest token to those held, accumulated in float32.

    A token is held in place j of page p where ``start[p] >= 0`` and ``start[p] + j <= now``. Places
    without a token must hold finite numbers. CUDA tensors go to kernels that split the keys over
    the device and join the parts by their log-sum-exp, all others to `decode_attention_reference`.

    Args:
        query: `[batch, query_heads, head_dim]`.
        keys: `[batch, kv_heads, N, head_dim]`, N = C * page_size.
        values: `[batch, kv_heads, N, value_dim]`.
        start: rank of the first token of each page, -1 for an unused place; int32
            `[batch, kv_heads, C]`.
        now: rank of each row's newest token, which is held; int64 `[batch]`; -1 for a row without
            any, whose output is zeros.
        page_size: tokens a page.
        scaling: factor on a query-key product before the softmax.
        pages: places to attend to, each once, int64 `[batch, kv_heads, K]`; None for all.
        softcap: scores become softcap * tanh(score / softcap); None for no cap.
        sinks: one logit for each query head that takes part in the softmax and has no value,
            `[query_heads]`; None for none.
        weights: return the attention weight of every token, reduced so over the query heads that
            share a KV head; None for no weights. Not with `pages`.

    Returns:
        The output, `[batch, query_heads, value_dim]` in the dtype of `values`; and the weights,
        float32 `[batch, kv_heads, N]`, or None.

    Raises:
        SparsityError: for `weights` together with `pages`, and on CUDA for tensors that the kernel
            cannot take.
    """
    if weights is not None and pages is not None:
        raise SparsityError(
            f"decode_attention(weights={weights!r}, pages=...): weights are those of every token; "
            "ask for them without a list of pages"
        )
    if not keys.is_cuda:
        rest = (pages, softcap, sinks, weights)
        return decode_attention_reference(
            query, keys, values, start, now, page_size, scaling, *rest
        )
    demand("decode_attention", keys, values, page_size)
    from sparsity.kernels.decode_attention_triton import decode_attention_op

    given = (query, keys, values, start, now, page_size, scaling, pages, softcap, sinks, weights)
    out, reduced = launch("decode_attention", decode_attention_op, *given)
    return out, None if weights is None else reduced


def decode_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    now: Tensor,
    page_size: int,
    scaling: float,
    pages: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    weights: Group | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`decode_attention` in plain torch: a mask over all places, in float32 or wider."""
    inside = torch.arange(page_size, device=keys.device)
    if pages is not None:
        at = (pages[..., None] * page_size + inside).flatten(2)[..., None]
        keys = keys.gather(2, at.expand(-1, -1, -1, keys.shape[-1]))
        values = values.gather(2, at.expand(-1, -1, -1, values.shape[-1]))
        start = start.gather(2, pages)
    rank = start[..., None] + inside
    held = (start[..., None] >= 0) & (rank <= now[:, None, None, None])
    mask = held.flatten(2)[:, :, None]
    each = attention_weights(query[:, :, None], keys, mask, scaling, softcap, sinks)[:, :, :, 0]
    out = torch.einsum("bhgn,bhnd->bhgd", each, values.to(each.dtype)).flatten(1, 2)
    reduced = None if weights is None else reduce_group(each, weights).float()
    return out.to(values.dtype), reduced
