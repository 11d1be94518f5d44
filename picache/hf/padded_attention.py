"""Attention of scattered tokens whose positions stand on the device: nothing is read back.

The twin of `picache.hf.attention.scattered_attention` for passes that are captured as CUDA graphs:
all shapes are fixed, and which rows are padding, where the others stand and how long each prompt is
are values in memory.
"""

import torch
from einops import rearrange
from torch import Tensor

from picache.hf.attention import attend_reference

# The most rows of a block, so that a mask, or scores, never take memory of rows times keys beyond.
_BLOCKS = {"cpu": 64, "cuda": 512}


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of rows at any positions over the keys up to each of them; padding gives zeros.

    What stands behind the last position of a prompt is never read into the result, NaN included.

    Args:
        query: ``[batch, heads, rows, head_dim]``.
        key: ``[batch, kv_heads, places, head_dim]``; the key of position i at place i.
        value: ``[batch, kv_heads, places, value_dim]``.
        positions: where the rows of each prompt stand, int64 ``[batch, rows]``; -1 for padding.
        scaling: factor on the scores.
        window: how many keys each row attends to at most, its own the last; None for all.
        softcap: see `picache.hf.attention.attend_reference`.
        sinks: see `picache.hf.attention.attend_reference`.

    Returns:
        ``[batch, heads, rows, value_dim]``.
    """
    places = torch.arange(key.shape[2], device=key.device)
    last = positions.amax(dim=1)
    unwritten = (places > last[:, None])[:, None, :, None]
    key, value = key.masked_fill(unwritten, 0), value.masked_fill(unwritten, 0)
    size = _BLOCKS.get(key.device.type, _BLOCKS["cpu"])
    out = []
    for rows, at in zip(query.split(size, dim=2), positions.split(size, dim=1), strict=True):
        allowed = places <= at[:, :, None]
        if window is not None:
            allowed &= places > at[:, :, None] - window
        padding = (at < 0)[:, :, None]
        allowed |= padding & (places == 0)  # a row that may attend to nothing would give NaN
        if softcap is None and sinks is None:
            attended = torch.nn.functional.scaled_dot_product_attention(
                rows, key, value, attn_mask=allowed[:, None], scale=scaling, enable_gqa=True
            )
        else:
            mask = rearrange(allowed, "b q n -> b 1 1 q n")
            attended = attend_reference(rows, key, value, mask, scaling, softcap, sinks)
        out.append(attended.masked_fill(padding[:, None], 0))
    return torch.cat(out, dim=2)
