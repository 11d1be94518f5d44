"""How much rows attend to each key, from the log-sum-exp that their attention left behind."""

import torch
from torch import Tensor

from picache.kernels.available import launch, require
from picache.kernels.scattered_attention import masked_scores, refuse


def last_rows(positions: Tensor, count: int | Tensor) -> Tensor:
    """The positions with -1 in place of all but the last `count` real rows of each row of a batch.

    Args:
        positions: as in `scattered_attention`, ``[batch, rows]``.
        count: how many, at least 1; or as many for each row of the batch, an integer tensor
            ``[batch]`` on the device.
    """
    real = positions >= 0
    left = real.flip(-1).cumsum(-1).flip(-1)  # real rows from here on
    most = count[:, None] if isinstance(count, Tensor) else count
    return torch.where(real & (left <= most), positions, -1)


def attention_mass(
    query: Tensor,
    keys: Tensor,
    positions: Tensor,
    lse: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The attention weight of each key, the mean over heads and over the rows that count.

    One pass over the products of queries and keys: `lse` has what the softmax divides by, sinks
    among it. CUDA tensors go to a kernel, all others to `attention_mass_reference`.

    Args:
        query: ``[batch, heads, rows, head_dim]``.
        keys: ``[batch, kv_heads, capacity, head_dim]``.
        positions: int64 or int32 ``[batch, rows]``, -1 for rows that do not count, as `last_rows`
            gives them; in each row of the batch at least one counts.
        lse: the log-sum-exp that `scattered_attention` returns for the same queries, fp32
            ``[batch, heads, rows]``.
        scaling: as in `scattered_attention`.
        window: as in `scattered_attention`.
        softcap: as in `scattered_attention`.
        weight: a factor on the weights of each key, such as the norm of its value,
            ``[batch, kv_heads, capacity]``; None for 1. Read up to the last row that counts.

    Returns:
        fp32 ``[batch, capacity]``; 0 behind the last row that counts.

    Raises:
        PICacheError: for shapes that do not go together, for a scaling or a window that is not
            above 0, and on CUDA for tensors that the kernel cannot take.
    """
    refuse("attention_mass", query, keys, positions, scaling, window)
    if not keys.is_cuda:
        rest = (scaling, window, softcap, weight)
        return attention_mass_reference(query, keys, positions, lse, *rest)
    require("attention_mass", (query.dtype, keys.dtype), keys.shape[-1], keys.shape[-1])
    from picache.kernels.attention_mass_triton import launch_attention_mass

    given = (query, keys, positions, lse, scaling, window, softcap, weight)
    return launch("attention_mass", keys, launch_attention_mass, *given)


def attention_mass_reference(
    query: Tensor,
    keys: Tensor,
    positions: Tensor,
    lse: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """`attention_mass` in plain torch: the weights of all rows, in float32."""
    scores = masked_scores(query, keys, positions, scaling, window, softcap)
    counts = positions >= 0
    each = (scores - lse.unflatten(1, (keys.shape[1], -1))[..., None]).exp()
    each = each.masked_fill(~counts[:, None, None, :, None], 0.0)
    by_head = each.sum((2, 3))  # [batch, kv_heads, capacity]
    if weight is not None:
        place = torch.arange(keys.shape[2], device=keys.device)
        behind = place > positions.amax(-1, keepdim=True)
        by_head = by_head * weight.float().masked_fill(behind[:, None], 0.0)
    return by_head.sum(1) / (query.shape[1] * counts.sum(-1, keepdim=True))
