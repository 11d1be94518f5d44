"""Attention of one token over the pages of a pool."""

import torch
from torch import Tensor

from sparsity.policies.base import Group, reduce_group
from sparsity.retention.attention import attention_weights


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, start: Tensor, now: Tensor, page_size: int,
    scaling: float, pages: Tensor | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, weights: Group | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Placeholder twin until the kernels land."""
    if pages is not None:
        size = page_size
        at = pages[..., None, None].expand(-1, -1, -1, size, keys.shape[-1])
        keys = keys.unflatten(2, (-1, size)).gather(2, at).flatten(2, 3)
        at = pages[..., None, None].expand(-1, -1, -1, size, values.shape[-1])
        values = values.unflatten(2, (-1, size)).gather(2, at).flatten(2, 3)
        start = start.gather(-1, pages)
    inside = torch.arange(page_size, device=start.device)
    rank = start[..., None] + inside
    filled = ((start >= 0)[..., None] & (rank <= now[:, None, None, None])).flatten(2)
    w = attention_weights(query[:, :, None], keys, filled[:, :, None], scaling, softcap, sinks)
    out = torch.einsum("bhgqn,bhnd->bhgqd", w, values.to(w.dtype)).to(values.dtype)
    out = out.flatten(1, 3) if out.shape[3] == 1 else out
    reduced = None if weights is None else reduce_group(w, weights)[:, :, 0]
    return out, reduced
