"""The new token of each row is written to its page; a row without room evicts its worst page."""

import torch
from torch import Tensor

from sparsity.errors import SparsityError
from sparsity.kernels.available import launch, require


def append(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    start: Tensor,
    stamp: Tensor,
    sums: Tensor,
    pinned: Tensor,
    kmin: Tensor | None,
    kmax: Tensor | None,
    current: Tensor,
    key: Tensor,
    value: Tensor,
    worth: Tensor | None,
    rank: Tensor,
    column: Tensor,
    valid: Tensor,
    page_size: int,
) -> None:
    """Write one token a row, in place, and open a page where its rank begins one.

    The new page takes the place of least worth, of equals that whose page is the oldest, of equals
    the first; a page that lies there is evicted. CUDA tensors go to one kernel, all others to
    `append_reference`.

    Args:
        keys: `[batch, kv_heads, N, head_dim]`, N = C * page_size; contiguous and of a
            memory of its own, as are the next nine: torch's compiler copies what shares memory.
        values: `[batch, kv_heads, N, value_dim]`.
        slots: column of the token in each place, -1 for none; int32 `[batch, kv_heads, N]`.
        start: rank of the first token of each page, -1 for an unused place; int32
            `[batch, kv_heads, C]`.
        stamp: a new page's is its start; int32 `[batch, kv_heads, C]`.
        sums: a new page's are zeros; float32 `[batch, kv_heads, C, n]`, n may be 0.
        pinned: a new page is not; bool `[batch, kv_heads, C]`.
        kmin: elementwise smallest key of each page, `[batch, kv_heads, C, head_dim]`, or None.
        kmax: elementwise largest key of each page, or None; both or neither.
        current: place of the newest page, int64 `[batch, kv_heads]`.
        key: of the new token, `[batch, kv_heads, head_dim]`.
        value: of the new token, `[batch, kv_heads, value_dim]`.
        worth: of each page, -inf for unused places and +inf for pages that stay as long as any
            other is left, as do those whose worth is not a number; float32 `[batch, kv_heads, C]`,
            read only where a page opens. None for a pool that never evicts: the first unused place.
        rank: of the new token, int64 `[batch]`.
        column: of the new token, an int64 scalar.
        valid: False for a row whose new token is padding, of which nothing changes; bool `[batch]`.
        page_size: tokens a page.

    Raises:
        SparsityError: on CUDA, for tensors that the kernel cannot take.
    """
    state = (keys, values, slots, start, stamp, sums, pinned, kmin, kmax, current)
    new = (key, value, worth, rank, column, valid, page_size)
    if not keys.is_cuda:
        append_reference(*state, *new)
        return
    require("append", keys, values, page_size)
    if not all(t.is_contiguous() for t in state if t is not None):
        raise SparsityError("append: the tensors of a pool must be contiguous, not views of others")
    from sparsity.kernels.append_triton import append_op

    launch("append", append_op, *state, *new)


def append_reference(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    start: Tensor,
    stamp: Tensor,
    sums: Tensor,
    pinned: Tensor,
    kmin: Tensor | None,
    kmax: Tensor | None,
    current: Tensor,
    key: Tensor,
    value: Tensor,
    worth: Tensor | None,
    rank: Tensor,
    column: Tensor,
    valid: Tensor,
    page_size: int,
) -> None:
    """`append` in plain torch, on any device, without a wait for it."""
    batch, heads = current.shape
    b = torch.arange(batch, device=keys.device)[:, None]
    h = torch.arange(heads, device=keys.device)[None]
    real, inside = valid[:, None], (rank % page_size)[:, None]
    opens = real & (inside == 0)

    if worth is None:
        worth = (start >= 0).float()
    worth = worth.masked_fill(worth.isnan(), torch.inf)
    least = worth == worth.amin(-1, keepdim=True)
    age = start.masked_fill(~least, torch.iinfo(start.dtype).max)
    page = torch.where(opens, age.argmin(-1), current)
    current.copy_(page)

    first = rank[:, None].to(start.dtype)
    start[b, h, page] = torch.where(opens, first, start[b, h, page])
    stamp[b, h, page] = torch.where(opens, first, stamp[b, h, page])
    sums[b, h, page] = sums[b, h, page].masked_fill(opens[..., None], 0)
    pinned[b, h, page] = pinned[b, h, page] & ~opens
    by_page = slots.view(batch, heads, -1, page_size)
    by_page[b, h, page] = by_page[b, h, page].masked_fill(opens[..., None], -1)

    at = page * page_size + inside
    keys[b, h, at] = torch.where(real[..., None], key, keys[b, h, at])
    values[b, h, at] = torch.where(real[..., None], value, values[b, h, at])
    slots[b, h, at] = torch.where(real, column.to(slots.dtype), slots[b, h, at])
    if kmin is not None and kmax is not None:
        low, high = kmin[b, h, page], kmax[b, h, page]
        new_low = torch.where(opens[..., None], key, torch.minimum(low, key))
        new_high = torch.where(opens[..., None], key, torch.maximum(high, key))
        kmin[b, h, page] = torch.where(real[..., None], new_low, low)
        kmax[b, h, page] = torch.where(real[..., None], new_high, high)
