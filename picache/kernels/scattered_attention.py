"""Attention of rows at any positions over an arena of keys, causal by position."""

import torch
from torch import Tensor

from picache.errors import PICacheError
from picache.kernels.available import launch, require


def scattered_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of rows to the keys at or before their positions, added up in float32.

    Places behind the last position of a row of the batch are not read and may hold anything. CUDA
    tensors go to kernels that split the keys over the device and join the parts by their
    log-sum-exp, all others to `scattered_attention_reference`.

    Args:
        query: ``[batch, heads, rows, head_dim]``.
        keys: ``[batch, kv_heads, capacity, head_dim]``; the place of a key is its position; heads
            is a multiple of kv_heads.
        values: ``[batch, kv_heads, capacity, value_dim]``.
        positions: where each row stands, int64 or int32 ``[batch, rows]``, ascending and below
            `capacity`; -1 for a row of padding, which attends to nothing.
        scaling: factor on the scores, above 0.
        window: how many keys a row sees, its own the last; None for all before it.
        softcap: bounds the scores to ``softcap * tanh(score / softcap)``; None for no bound.
        sinks: ``[heads]``, one extra logit per head that takes attention weight and has no value;
            None where the model has none.

    Returns:
        The output, ``[batch, heads, rows, value_dim]`` in the dtype of `values`, zeros for rows of
        padding; and the log-sum-exp of each row's scores, sinks among them, fp32
        ``[batch, heads, rows]``, -inf for rows of padding. On CUDA both are laid out with the
        rows before the heads, so that ``out.transpose(1, 2)`` is contiguous.

    Raises:
        PICacheError: for shapes that do not go together, for a scaling or a window that is not
            above 0, and on CUDA for tensors that the kernels cannot take.
    """
    refuse("scattered_attention", query, keys, positions, scaling, window)
    if not keys.is_cuda:
        rest = (scaling, window, softcap, sinks)
        return scattered_attention_reference(query, keys, values, positions, *rest)
    dtypes = (query.dtype, keys.dtype, values.dtype)
    require("scattered_attention", dtypes, keys.shape[-1], values.shape[-1])
    from picache.kernels.scattered_attention_triton import launch_scattered_attention

    given = (query, keys, values, positions, scaling, window, softcap, sinks)
    return launch("scattered_attention", keys, launch_scattered_attention, *given)


def scattered_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`scattered_attention` in plain torch: a mask over all places, in float32."""
    scores = masked_scores(query, keys, positions, scaling, window, softcap)
    logits = scores
    if sinks is not None:
        column = sinks.float().view(1, keys.shape[1], -1, 1, 1)
        logits = torch.cat([scores, column.expand(*scores.shape[:-1], 1)], dim=-1)
    padding = (positions < 0)[:, None, None]
    lse = logits.logsumexp(-1).masked_fill(padding, -torch.inf)
    weights = (scores - lse[..., None]).exp().masked_fill(padding[..., None], 0.0)
    # What is behind the last position may be NaN, and 0 times NaN is not 0.
    place = torch.arange(values.shape[2], device=values.device)
    behind = place > positions.amax(-1, keepdim=True)
    held = values.float().masked_fill(behind[:, None, :, None], 0.0)
    out = torch.einsum("bhgrn,bhnd->bhgrd", weights, held)
    return out.flatten(1, 2).to(values.dtype), lse.flatten(1, 2)


def masked_scores(
    query: Tensor,
    keys: Tensor,
    positions: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Scores, -inf where a row sees no key, fp32 ``[batch, kv_heads, groups, rows, capacity]``."""
    grouped = query.unflatten(1, (keys.shape[1], -1)).float()
    scores = torch.einsum("bhgrd,bhnd->bhgrn", grouped, keys.float()) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place, at = torch.arange(keys.shape[2], device=keys.device), positions[..., None]
    seen = place <= at
    if window is not None:
        seen &= place > at - window
    return scores.masked_fill(~seen[:, None, None], -torch.inf)


def refuse(
    name: str,
    query: Tensor,
    keys: Tensor,
    positions: Tensor,
    scaling: float,
    window: int | None,
) -> None:
    """Raise PICacheError for what a kernel would not notice."""
    batch, heads, rows, dim = query.shape
    fitting = keys.shape[0] == batch and heads % keys.shape[1] == 0 and keys.shape[3] == dim
    if not fitting or positions.shape != (batch, rows):
        raise PICacheError(
            f"{name}: query {tuple(query.shape)}, keys {tuple(keys.shape)} and positions "
            f"{tuple(positions.shape)} do not go together; give [batch, heads, rows, head_dim], "
            "[batch, kv_heads, capacity, head_dim] and [batch, rows]"
        )
    if not scaling > 0:
        raise PICacheError(
            f"{name}(scaling={scaling}): a factor above 0 is needed; fold a sign into the queries"
        )
    if window is not None and window < 1:
        raise PICacheError(
            f"{name}(window={window}): a row sees at least itself; None is for no window"
        )
