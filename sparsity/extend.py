"""Several tokens at once into a page pool: pages are laid out anew and pruned to the budget."""

import torch
from torch import Tensor

from sparsity.pages import PagePool, best
from sparsity.policy import Policy
from sparsity.rows import Step, max_pages


def extend(
    pool: PagePool | None,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    step: Step,
    policy: Policy,
    layer: int,
    query: Tensor,
    scaling: float,
) -> PagePool:
    """The pool after a forward of several tokens; shares no memory with its arguments.

    keys, values: the places of `pool` in use and then the T new columns,
    `[batch, kv_heads, n + T, head_dim]`. slots: their columns, int32 `[batch, kv_heads, n + T]`.
    query: the newest token's, `[batch, query_heads, head_dim]`: the policy observes before
    anything is evicted. scaling: factor on a query-key product before the softmax.
    """
    size, limit = policy.page_size, max_pages(policy)
    batch, heads = keys.shape[:2]
    start, stamp, pinned, used = _pages(pool, step, policy, heads)
    source, filled = _source(start, step, size, keys.shape[2] - (step.stop - step.first))
    kmin = kmax = None
    if policy.summaries:
        kmin, kmax = _summaries(keys, source, filled, size)
    new = PagePool(
        size=size,
        layer=layer,
        keys=keys,
        values=values,
        slots=slots,
        start=start,
        stamp=stamp,
        pinned=pinned,
        kmin=kmin,
        kmax=kmax,
        current=_current(pool, step, used, size).expand(batch, heads).contiguous(),
    )
    now = step.after - 1
    stamps = policy.observe(query, new.view(now, start.shape[-1]), scaling)
    if stamps is not None:
        new.stamp = stamps.to(torch.int32)
    if limit is not None and start.shape[-1] > limit:
        newest = torch.arange(start.shape[-1], device=keys.device) == new.current[..., None]
        worth = policy.priority(new.view(now, start.shape[-1]))
        kept = best(worth.masked_fill(new.pinned | newest, torch.inf), start, limit)
        source, filled = _take_pages(source, kept, size), _take_pages(filled, kept, size)
        new.start, new.stamp = start.gather(-1, kept), new.stamp.gather(-1, kept)
        new.pinned = new.pinned.gather(-1, kept)
        if kmin is not None and kmax is not None:
            wide = kept[..., None].expand(-1, -1, -1, kmin.shape[-1])
            new.kmin, new.kmax = kmin.gather(2, wide), kmax.gather(2, wide)
        new.current = (new.start >= 0).sum(-1).clamp(min=1) - 1  # oldest first: the newest is last
    new.slots = slots.expand(-1, heads, -1).gather(-1, source).masked_fill(~filled, -1)
    new.keys = keys.detach().gather(2, source[..., None].expand(-1, -1, -1, keys.shape[-1]))
    new.values = values.detach().gather(2, source[..., None].expand(-1, -1, -1, values.shape[-1]))
    return new


def _pages(
    pool: PagePool | None, step: Step, policy: Policy, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """start, stamp, pinned `[batch, heads, pages]` of the old and then the new pages of each row.

    The fourth is the number of old pages of each row, `[batch, 1, 1]`.
    """
    size, limit = policy.page_size, max_pages(policy)
    before, after = step.before[:, None, None], step.after[:, None, None]
    held = -(-before // size)
    used = held if limit is None else held.clamp(max=limit)
    pages = step.pages_total if limit is None else step.pages_kept
    place = torch.arange(pages, device=before.device)
    fresh = (place >= used) & (place < used + -(-after // size) - held)
    start = torch.where(fresh, (held + place - used) * size, -1).to(torch.int32)
    start = start.expand(-1, heads, -1).contiguous()
    stamp = start.clone()  # a new page is stamped with the rank of its first token
    pinned = torch.zeros_like(start, dtype=torch.bool)
    if pool is not None:
        old = min(pool.start.shape[-1], pages)
        is_old = (place < used)[..., :old]
        start[..., :old] = torch.where(is_old, pool.start[..., :old], start[..., :old])
        stamp[..., :old] = torch.where(is_old, pool.stamp[..., :old], stamp[..., :old])
        pinned[..., :old] = is_old & pool.pinned[..., :old]
    if policy.pin_prompt:  # a page that holds any of the new tokens
        pinned |= (start >= 0) & (start + size > before) & (after > before)
    return start, stamp, pinned, used


def _source(start: Tensor, step: Step, size: int, old: int) -> tuple[Tensor, Tensor]:
    """Where each place's token comes from among `old` old places and then the new columns.

    Returns int64 and bool `[batch, kv_heads, pages * size]`; the second is False for no token.
    """
    assert step.order is not None
    before, after = step.before[:, None, None], step.after[:, None, None]
    place = torch.arange(start.shape[-1] * size, device=start.device)
    rank = start.long().repeat_interleave(size, -1) + place % size
    filled = (start >= 0).repeat_interleave(size, -1) & (rank < after)
    column = (rank - before).clamp(0, step.order.shape[-1] - 1)
    order = step.order[:, None].expand(-1, start.shape[1], -1)
    source = torch.where(rank < before, place, old + order.gather(-1, column))
    return source.where(filled, 0), filled


def _current(pool: PagePool | None, step: Step, used: Tensor, size: int) -> Tensor:
    """Place of each row's newest page, before anything is evicted: int64 `[batch, heads or 1]`."""
    fresh = (-(-step.after // size) - -(-step.before // size))[:, None]
    newest = (used[..., 0] + fresh - 1).clamp(min=0)
    return newest if pool is None else torch.where(fresh > 0, newest, pool.current)


def _summaries(keys: Tensor, source: Tensor, filled: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest key of each page, `[batch, kv_heads, pages, head_dim]`; 0 for none."""
    paged = keys.detach().gather(2, source[..., None].expand(-1, -1, -1, keys.shape[-1]))
    paged = paged.unflatten(2, (-1, size))
    empty = ~filled.unflatten(2, (-1, size))[..., None]
    none = empty.all(3)
    kmin = paged.masked_fill(empty, torch.inf).amin(3).masked_fill(none, 0)
    kmax = paged.masked_fill(empty, -torch.inf).amax(3).masked_fill(none, 0)
    return kmin, kmax


def _take_pages(places: Tensor, kept: Tensor, size: int) -> Tensor:
    """`[batch, kv_heads, pages * size]` to the pages of `kept`, `[batch, kv_heads, K * size]`."""
    pages = places.unflatten(-1, (-1, size))
    return pages.gather(2, kept[..., None].expand(-1, -1, -1, size)).flatten(2)
