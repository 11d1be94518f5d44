"""Attention of scattered rows: queries at any positions over all keys, causal by position.

A causal flag is of no use here: it aligns query rows to the end (or the start) of the keys, while
the recomputed rows lie anywhere. The mask is evaluated on true positions, for a block of rows at a
time, so it never takes more than a bound (`_BLOCKS`), whatever the prompt's length.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

MaskFunction = Callable[[Tensor, Tensor], Tensor]  # positions [q], [n] -> allowed, bool [q, n]
# Rows of a block and elements of its mask, at most. A block's keys end at its last row: smaller
# blocks skip more, with more calls. A CPU takes what fits its caches; an H200 three times as long
# in blocks of 64 as in one of 304 rows on 32,832 keys (torch 2.11, bf16).
_BLOCKS = {"cpu": (64, 2**22), "cuda": (512, 2**25)}


def _blocks(device: torch.device) -> tuple[int, int]:
    return _BLOCKS.get(device.type, _BLOCKS["cpu"])


def _scores(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Scores before the mask, fp32 ``[batch, kv_heads, heads / kv_heads, q, n]``."""
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
    """The weights of `attend_reference`, fp32 ``[batch, kv_heads, heads / kv_heads, q, n]``."""
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
    """Softmax attention written out, in fp32: the slow twin.

    Args:
        query: ``[batch, heads, q, head_dim]``.
        key: ``[batch, kv_heads, n, head_dim]``; heads is a multiple of kv_heads.
        value: ``[batch, kv_heads, n, value_dim]``.
        allowed: bool ``[q, n]``; every row allows at least one key.
        scaling: factor on the scores.
        softcap: ``softcap * tanh(score / softcap)`` before the mask (Gemma 2).
        sinks: ``[heads]``, one extra logit per head that takes weight and has no value (GPT-OSS).

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
    """Attention of the rows at `positions` over keys at positions ``0..n-1``.

    Rows are taken in blocks; a block's keys end at its last position, since what lies behind is
    never allowed.

    Args:
        query: ``[batch, heads, q, head_dim]``, rows sorted by position.
        key: ``[batch, kv_heads, n, head_dim]``.
        value: ``[batch, kv_heads, n, value_dim]``.
        positions: int64 ``[q]``, ascending.
        mask: allowed(query positions, key positions), causal at least.
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
    rows = max(1, min(most, elements // key.shape[2]))
    ends = [*positions_on_cpu[rows - 1 :: rows].tolist(), int(positions_on_cpu[-1])]
    out = []
    for block, end in zip(range(0, len(positions), rows), ends, strict=False):
        at = positions[block : block + rows]
        allowed = mask(at, torch.arange(end + 1, device=at.device))
        parts = (query[:, :, block : block + rows], key[:, :, : end + 1], value[:, :, : end + 1])
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
    """Attention whose log-sum-exp over some keys is scaled before the two parts are joined.

    With L_c and L_o the log-sum-exp of the scores on the parallel and on the other keys and O_c and
    O_o the attention outputs of each alone: (e^{s L_c} O_c + e^{L_o} O_o) / (e^{s L_c} + e^{L_o}),
    where s is `lse_scale`. Written out in fp32.

    Args:
        query: ``[batch, heads, q, head_dim]``.
        key: ``[batch, kv_heads, n, head_dim]``, the parallel ones divided by the temperature.
        value: ``[batch, kv_heads, n, value_dim]``.
        allowed: bool, broadcast to ``[batch, 1, q, n]``; each row allows a key of the others.
        parallel: bool ``[batch, n]``.
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
    # Scaling the log-sum-exp of a part is adding (lse_scale - 1) times it to each of its scores.
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
    """How much the rows attend to each key: the mean over rows and heads of the softmax weights.

    Args:
        query: ``[1, heads, q, head_dim]``, rows sorted by position.
        key: ``[1, kv_heads, n, head_dim]``.
        positions: int64 ``[q]``, ascending.
        mask: allowed(query positions, key positions).
        scaling: factor on the scores.
        softcap: see `attend_reference`.
        sinks: see `attend_reference`.
        weight: ``[1, kv_heads, n, 1]``, a factor on the weights by key; None for 1.

    Returns:
        fp32 ``[n]``.
    """
    heads, n = query.shape[1], key.shape[2]
    factor = 1.0 if weight is None else rearrange(weight.float(), "1 h n 1 -> 1 h 1 1 n")
    rows = max(1, _blocks(key.device)[1] // (heads * n))
    mass = torch.zeros(n, dtype=torch.float32, device=key.device)
    everything = torch.arange(n, device=key.device)
    for block in range(0, len(positions), rows):
        allowed = mask(positions[block : block + rows], everything)
        part = query[:, :, block : block + rows]
        weights = softmax_weights(part, key, allowed, scaling, softcap, sinks)
        mass += (weights * factor).sum(dim=(0, 1, 2, 3))
    return mass / (heads * len(positions))
