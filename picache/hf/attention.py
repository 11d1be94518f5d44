"""Attention of scattered tokens: queries at any positions over all keys, causal by position.

The causal flag of attention kernels is of no use here: it takes the queries to be the last (or the
first) tokens of the keys, while recomputed tokens lie anywhere in the prompt. The mask is evaluated
on true positions instead, for a block of queries at a time, so that it never takes more memory than
a fixed bound (`_BLOCKS`), whatever the prompt's length.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

MaskFunction = Callable[[Tensor, Tensor], Tensor]  # positions [q], [n] -> allowed, bool [q, n]
# The most queries of a block, and the most elements of its mask. The keys of a block end at its
# last query, so that smaller blocks skip more keys but need more calls. On a CPU a block should fit
# the caches; an H200 takes three times as long in blocks of 64 queries as in one block of 304, on
# 32,832 keys (torch 2.11, bf16).
_BLOCKS = {"cpu": (64, 2**22), "cuda": (512, 2**25)}


def _blocks(device: torch.device) -> tuple[int, int]:
    return _BLOCKS.get(device.type, _BLOCKS["cpu"])


def _scores(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Attention scores before the mask, fp32 ``[batch, kv_heads, heads / kv_heads, q, n]``."""
    grouped = rearrange(query, "b (h g) q d -> b h g q d", h=key.shape[1]).float()
    scores = torch.einsum("bhgqd,bhnd->bhgqn", grouped, key.float()) * scaling
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def softmax_weights(
    query: Tensor,
    key: Tensor,
    allowed: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention weights, fp32 ``[batch, kv_heads, heads / kv_heads, q, n]``.

    The arguments are those of `attend_reference`. The weight of an attention sink is left out, so
    that with sinks the weights of a query add up to less than 1.
    """
    scores = _scores(query, key, scaling, softcap).masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        column = rearrange(sinks.float(), "(h g) -> 1 h g 1 1", h=key.shape[1])
        scores = torch.cat([scores, column.expand(*scores.shape[:-1], 1)], dim=-1)
    return scores.softmax(dim=-1)[..., : key.shape[2]]


def attend_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention written out in fp32: the slow twin of the fused kernels.

    Args:
        query: ``[batch, heads, q, head_dim]``.
        key: ``[batch, kv_heads, n, head_dim]``; heads is a multiple of kv_heads.
        value: ``[batch, kv_heads, n, value_dim]``.
        allowed: which keys a query may attend to, bool ``[q, n]``; at least one for every query.
        scaling: factor on the scores.
        softcap: bounds the scores to ``softcap * tanh(score / softcap)`` before the mask (Gemma 2);
            None for no bound.
        sinks: ``[heads]``, one extra logit per head that takes attention weight and has no value
            (GPT-OSS); None where the model has none.

    Returns:
        ``[batch, heads, q, value_dim]`` in the query's dtype.
    """
    weights = softmax_weights(query, key, allowed, scaling, softcap, sinks)
    out = torch.einsum("bhgqn,bhnd->bhgqd", weights, value.float())
    return rearrange(out, "b h g q d -> b (h g) q d").to(query.dtype)


def scattered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    mask: MaskFunction,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    positions_on_cpu: Tensor | None = None,
) -> Tensor:
    """Attention of queries at any positions over the keys at positions ``0..n-1``.

    Queries are taken in blocks. A block reads the keys up to its last position alone: later keys
    are never allowed.

    Args:
        query: ``[batch, heads, q, head_dim]``, in the order of `positions`.
        key: ``[batch, kv_heads, n, head_dim]``.
        value: ``[batch, kv_heads, n, value_dim]``.
        positions: where the queries stand in the prompt, int64 ``[q]``, ascending.
        mask: gives, for positions of queries and of keys, which keys each query may attend to;
            never a later one.
        scaling: factor on the scores.
        softcap: see `attend_reference`.
        sinks: see `attend_reference`.
        positions_on_cpu: the same positions on the CPU, where reading them does not wait for the
            device; None to fetch them.

    Returns:
        ``[batch, heads, q, value_dim]``.
    """
    positions_on_cpu = positions.cpu() if positions_on_cpu is None else positions_on_cpu
    most, elements = _blocks(key.device)
    size = max(1, min(most, elements // key.shape[2]))
    ends = [*positions_on_cpu[size - 1 :: size].tolist(), int(positions_on_cpu[-1])]
    out = []
    for start, end in zip(range(0, len(positions), size), ends, strict=False):
        block = slice(start, start + size)
        allowed = mask(positions[block], torch.arange(end + 1, device=positions.device))
        parts = (query[:, :, block], key[:, :, : end + 1], value[:, :, : end + 1])
        if softcap is None and sinks is None:
            out.append(
                torch.nn.functional.scaled_dot_product_attention(
                    *parts, attn_mask=allowed, scale=scaling, enable_gqa=True
                )
            )
        else:
            out.append(attend_reference(*parts, allowed, scaling, softcap, sinks))
    return torch.cat(out, dim=2)


def parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    parallel: Tensor,
    scaling: float,
    lse_scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention in which the log-sum-exp over the keys of parallel chunks is scaled (APE).

    Let L_c and L_o be the log-sum-exp of a query's scores on the parallel and on the other keys,
    and O_c and O_o its attention output over each group alone. The result is (e^{s L_c} O_c +
    e^{L_o} O_o) / (e^{s L_c} + e^{L_o}), where s is `lse_scale`. Written out in fp32.

    Args:
        query: ``[batch, heads, q, head_dim]``.
        key: ``[batch, kv_heads, n, head_dim]``; the parallel ones are divided by the temperature
            already.
        value: ``[batch, kv_heads, n, value_dim]``.
        allowed: which keys a query may attend to, bool, broadcast to ``[batch, 1, q, n]``; every
            query at least one that is not parallel.
        parallel: which keys belong to chunks side by side, bool ``[batch, n]``.
        scaling: factor on the scores.
        lse_scale: factor on the log-sum-exp of the parallel keys (APE's scale S).
        softcap: see `attend_reference`.

    Returns:
        ``[batch, heads, q, value_dim]`` in the query's dtype.
    """
    scores = _scores(query, key, scaling, softcap).masked_fill(~allowed[:, :, None], -torch.inf)
    inside = scores.masked_fill(~parallel[:, None, None, None], -torch.inf)
    outside = scores.masked_fill(parallel[:, None, None, None], -torch.inf)
    mass = inside.logsumexp(dim=-1, keepdim=True)
    # To scale the log-sum-exp of a group, add (lse_scale - 1) times it to each score of the group.
    shift = torch.where(mass.isinf(), 0.0, (lse_scale - 1) * mass)
    weights = torch.maximum(inside + shift, outside).softmax(dim=-1)
    out = torch.einsum("bhgqn,bhnd->bhgqd", weights, value.float())
    return rearrange(out, "b h g q d -> b (h g) q d").to(query.dtype)


def attention_mass(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    mask: MaskFunction,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """How much the queries attend to each key: the mean over queries and heads of the weights.

    Args:
        query: ``[1, heads, q, head_dim]``, in the order of `positions`.
        key: ``[1, kv_heads, n, head_dim]``.
        positions: where the queries stand in the prompt, int64 ``[q]``, ascending.
        mask: see `scattered_attention`.
        scaling: factor on the scores.
        softcap: see `attend_reference`.
        sinks: see `attend_reference`.
        weight: ``[1, kv_heads, n, 1]``, a factor on the attention weights of each key; None for 1.

    Returns:
        fp32 ``[n]``.
    """
    heads, n = query.shape[1], key.shape[2]
    factor = 1.0 if weight is None else rearrange(weight.float(), "1 h n 1 -> 1 h 1 1 n")
    size = max(1, _blocks(key.device)[1] // (heads * n))
    mass = torch.zeros(n, dtype=torch.float32, device=key.device)
    everything = torch.arange(n, device=key.device)
    for start in range(0, len(positions), size):
        block = slice(start, start + size)
        allowed = mask(positions[block], everything)
        weights = softmax_weights(query[:, :, block], key, allowed, scaling, softcap, sinks)
        mass += (weights * factor).sum(dim=(0, 1, 2, 3))
    return mass / (heads * len(positions))
