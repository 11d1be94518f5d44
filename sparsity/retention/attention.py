"""Attention over the keys that are held: a plain reference, and the dispatch to fast kernels."""

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class PromptAttention(Protocol):
    """Attention of a prompt by the model's own function.

    Attributes:
        name: of the implementation, as in `attn_implementation`.
    """

    name: str

    def refused(self, query: Tensor, key: Tensor, value: Tensor) -> str:
        """Why it cannot compute the prompt right; empty where it can.

        Args:
            query: `[batch, query_heads, tokens, head_dim]`.
            key: `[batch, kv_heads, tokens, head_dim]`.
            value: `[batch, kv_heads, tokens, value_dim]`.
        """
        ...

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[batch, tokens, query_heads, value_dim]`; arguments as of `refused`."""
        ...


def attend_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scaling: float = 1.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention written out, in float32 or wider, for grouped queries.

    Args:
        query: `[batch, query_heads, q, head_dim]`.
        key: `[batch, kv_heads, n, head_dim]`.
        value: `[batch, kv_heads, n, value_dim]`.
        mask: bool (True where a query attends) or additive float,
            `[batch or 1, kv_heads or 1, q, n]`; None for no mask.
        scaling: factor on a query-key product before the softmax.
        softcap: scores become softcap * tanh(score / softcap); None for no cap.
        sinks: one logit for each query head that takes part in the softmax and has no value,
            `[query_heads]`; None for none.
        dropout: probability with which a weight is set to zero.

    Returns:
        `[batch, q, query_heads, value_dim]` in the dtype of `value`; zeros for a query that may
        attend to nothing.
    """
    weights = attention_weights(query, key, mask, scaling, softcap, sinks)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    out = torch.einsum("bhgqn,bhnd->bhgqd", weights, value.to(weights.dtype)).to(value.dtype)
    return out.flatten(1, 2).transpose(1, 2).contiguous()


def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    scaling: float = 1.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The attention weight of each key for each query.

    Args:
        query: `[batch, query_heads, q, head_dim]`.
        key: `[batch, kv_heads, n, head_dim]`.
        mask: see `attend_reference`.
        scaling: see `attend_reference`.
        softcap: see `attend_reference`.
        sinks: see `attend_reference`.

    Returns:
        `[batch, kv_heads, query_heads / kv_heads, q, n]`, float32 or the wider type of `query`;
        zeros for a query that may attend to nothing.
    """
    batch, _, queries, head_dim = query.shape
    kv_heads, dtype = key.shape[1], torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(batch, kv_heads, -1, queries, head_dim).to(dtype)
    scores = torch.einsum("bhgqd,bhnd->bhgqn", grouped, key.to(dtype)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    elif mask is not None:
        scores = scores + mask[:, :, None].to(dtype)
    if sinks is not None:
        sink = sinks.to(dtype).view(1, kv_heads, -1, 1, 1)
        scores = torch.cat([scores, sink.expand(batch, -1, -1, queries, 1)], dim=-1)
    return scores.softmax(-1).nan_to_num(0.0)[..., : key.shape[2]]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scaling: float = 1.0,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`attend_reference` by the fastest kernel that computes it; keys and values are not repeated.

    A query that may attend to nothing gives finite values, to be ignored.

    Args:
        query: see `attend_reference`, and so for the arguments that are not listed here.
        key: `[batch, kv_heads, n, head_dim]`.
        value: `[batch, kv_heads, n, value_dim]`.
        mask: see `attend_reference`.
        scaling: factor on a query-key product before the softmax.
        causal: there are as many queries as keys, and each attends to itself and all before it;
            given instead of a mask.
        softcap: see `attend_reference`.
        sinks: see `attend_reference`.
        dropout: see `attend_reference`.
    """
    batch, query_heads, queries, _ = query.shape
    kv_heads, length = key.shape[1:3]
    if softcap is not None or sinks is not None:
        if causal:
            mask = query.new_ones(queries, length, dtype=torch.bool).tril()[None, None]
        return attend_reference(query, key, value, mask, scaling, softcap, sinks, dropout)
    if mask is not None and queries > 1 and mask.dtype == torch.bool:
        mask = mask | ~mask.any(-1, keepdim=True)  # padding queries: any value, but no NaN
    groups = query_heads // kv_heads
    whole = mask is None or mask.shape[1] == 1 or groups == 1
    if groups > 1 and (queries == 1 or not whole):
        # The queries of a group side by side, as if they were so many positions.
        query = query.reshape(batch, kv_heads, groups * queries, -1)
        if mask is not None:
            mask = mask[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != kv_heads,
    )
    out = out.reshape(batch, query_heads, queries, -1)
    return out.transpose(1, 2).contiguous()
