"""Attention of scattered tokens: queries at any positions over all keys, causal by position.

The causal flag of attention kernels is of no use here: it takes the queries to be the last (or the
first) tokens of the keys, while recomputed tokens lie anywhere in the prompt. The mask is evaluated
on true positions instead, for a block of queries at a time, so that it never takes more memory than
a fixed bound (`_Bounds`), whatever the prompt's length.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

MaskFunction = Callable[[Tensor, Tensor], Tensor]  # positions [q], [n] -> allowed, bool [q, n]


class _Bounds(NamedTuple):
    """Of a block of queries, whose keys end at its last query.

    Attributes:
        queries: the most of them.
        elements: the most elements of its mask.
        gap: the block ends before a query that stands far behind: where the keys in between, times
            the queries so far, are as many scores as this, none of which is allowed.
    """

    queries: int
    elements: int
    gap: float


# Smaller blocks skip more keys but need more calls. On a CPU a block should fit the caches, and a
# call is cheap; an H200 takes three times as long in blocks of 64 queries as in one block of 304,
# on 32,832 keys (torch 2.11, bf16).
_BOUNDS = {"cpu": _Bounds(64, 2**22, 2**10), "cuda": _Bounds(512, 2**25, math.inf)}


def bounds(device: torch.device) -> _Bounds:
    """How large a block of queries may be on a device."""
    return _BOUNDS.get(device.type, _BOUNDS["cpu"])


@dataclass(frozen=True)
class Block:
    """Some queries of a pass, and which of the keys up to the last of them they may attend to.

    Attributes:
        rows: which queries.
        allowed: bool ``[q, n]``; the keys are those at positions ``0..n-1``.
        dtype: of the queries.
    """

    rows: slice
    allowed: Tensor
    dtype: torch.dtype

    @cached_property
    def added(self) -> Tensor:
        """The mask as it is added to scores, ``[q, n]``: 0 where a key is allowed, else -inf."""
        zeros = torch.zeros(self.allowed.shape, dtype=self.dtype, device=self.allowed.device)
        return zeros.masked_fill_(~self.allowed, -torch.inf)


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


def mask_blocks(
    positions: Tensor,
    positions_on_cpu: Tensor,
    mask: MaskFunction,
    keys: int,
    dtype: torch.dtype,
) -> Iterator[Block]:
    """Cut the queries of a pass into blocks, and evaluate the mask of each.

    Later keys than a block's last position are never allowed and stand in no block.

    Args:
        positions: where the queries stand in the prompt, int64 ``[q]``, ascending.
        positions_on_cpu: the same positions on the CPU, where reading them does not wait for the
            device.
        mask: gives, for positions of queries and of keys, which keys each query may attend to;
            never a later one.
        keys: tokens of the whole prompt.
        dtype: of the queries.
    """
    most, elements, gap = bounds(positions.device)
    most = max(1, min(most, elements // keys))
    where = positions_on_cpu.tolist()
    everything = torch.arange(where[-1] + 1, device=positions.device)
    start = 0
    for stop in range(1, len(where) + 1):
        if stop < len(where) and stop - start < most:
            unused = where[stop] - where[stop - 1] - 1
            if not unused or (stop - start) * unused < gap:
                continue
        rows = slice(start, stop)
        yield Block(rows, mask(positions[rows], everything[: where[stop - 1] + 1]), dtype)
        start = stop


def attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Iterable[Block],
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the queries of all blocks, in their order; see `scattered_attention`."""
    out = []
    for block in blocks:
        end = block.allowed.shape[1]
        parts = (query[:, :, block.rows], key[:, :, :end], value[:, :, :end])
        if softcap is None and sinks is None:
            attended = torch.nn.functional.scaled_dot_product_attention(
                *parts, attn_mask=block.added, scale=scaling, enable_gqa=True
            )
        else:
            attended = attend_reference(*parts, block.allowed, scaling, softcap, sinks)
        out.append(attended.transpose(1, 2))
    return torch.cat(out, dim=1).transpose(1, 2)  # in memory as the layer behind it reads it


def scattered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    mask: MaskFunction,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of queries at any positions over the keys at positions ``0..n-1``.

    Args:
        query: ``[batch, heads, q, head_dim]``, in the order of `positions`.
        key: ``[batch, kv_heads, n, head_dim]``.
        value: ``[batch, kv_heads, n, value_dim]``.
        positions: where the queries stand in the prompt, int64 ``[q]``, ascending.
        mask: see `mask_blocks`.
        scaling: factor on the scores.
        softcap: see `attend_reference`.
        sinks: see `attend_reference`.

    Returns:
        ``[batch, heads, q, value_dim]``; in memory ``[batch, q, heads, value_dim]``.
    """
    blocks = mask_blocks(positions, positions.cpu(), mask, key.shape[2], query.dtype)
    return attend_blocks(query, key, value, blocks, scaling, softcap, sinks)


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
        mask: see `mask_blocks`.
        scaling: factor on the scores.
        softcap: see `attend_reference`.
        sinks: see `attend_reference`.
        weight: ``[1, kv_heads, n, 1]``, a factor on the attention weights of each key; None for 1.

    Returns:
        fp32 ``[n]``.
    """
    heads, n = query.shape[1], key.shape[2]
    factor = 1.0 if weight is None else rearrange(weight.float(), "1 h n 1 -> 1 h 1 1 n")
    size = max(1, bounds(key.device).elements // (heads * n))
    mass = torch.zeros(n, dtype=torch.float32, device=key.device)
    everything = torch.arange(n, device=key.device)
    for start in range(0, len(positions), size):
        block = slice(start, start + size)
        allowed = mask(positions[block], everything)
        weights = softmax_weights(query[:, :, block], key, allowed, scaling, softcap, sinks)
        mass += (weights * factor).sum(dim=(0, 1, 2, 3))
    return mass / (heads * len(positions))
