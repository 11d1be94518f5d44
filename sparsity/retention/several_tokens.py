"""Several tokens at once into a page pool: pages are laid out anew and pruned to the budget."""

from dataclasses import replace

import torch
from torch import Tensor

from sparsity.policies.base import PageView, Policy
from sparsity.retention.batch_rows import Step
from sparsity.retention.page_pool import PagePool, ranking
from sparsity.retention.query_weights import Weigh, keep_last, window_weights


def extend(
    pool: PagePool | None,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    step: Step,
    policy: Policy,
    layer: int,
    first_head: int,
    query: Tensor,
    newest: Tensor,
    weights: Tensor | None,
    scaling: float,
    weigh: Weigh,
) -> PagePool:
    """The pool after a forward of several tokens; shares no memory with its arguments.

    keys, values: the places of `pool` in use and then the T new columns,
    `[batch, kv_heads, n + T, head_dim]`. slots: their columns, int32 `[batch, kv_heads, n + T]`.
    query: of this forward, `[batch, query_heads, q, head_dim]`; newest: of each row's newest
    token, `[batch, query_heads, head_dim]`. weights: attention over the columns where the policy
    needs it, `[batch, kv_heads, n + T]`. The policy observes before anything is evicted.
    """
    size, needs = policy.page_size, policy.needs
    heads = keys.shape[1]
    keys, values = keys.detach(), values.detach()
    slots = slots.expand(-1, heads, -1)
    start, newest_page = _starts(pool, step, size, heads)
    source, filled = _source(start, step, size, keys.shape[2] - (step.stop - step.first))
    old = 0 if pool is None else pool.high
    stamp = start.clone()  # a new page is stamped with the rank of its first token
    dtype = torch.promote_types(keys.dtype, torch.float32)
    sums = keys.new_zeros((*start.shape, needs.sums), dtype=dtype)
    pinned = torch.zeros_like(start, dtype=torch.bool)
    if pool is not None:
        stamp[..., :old], sums[:, :, :old] = pool.stamp[..., :old], pool.sums[:, :, :old]
        pinned[..., :old] = pool.pinned[..., :old]
    before, after = step.before[:, None, None], step.after[:, None, None]
    goes_on = after > before
    if policy.pin_prompt:  # a page that holds any of the new tokens
        pinned |= (start >= 0) & (start + size > before) & goes_on
    kmin, kmax = _summaries(keys, source, filled, size) if needs.summaries else (None, None)
    pages = PageView(
        start=start,
        stamp=stamp,
        sums=sums,
        pinned=pinned,
        filled=filled,
        kmin=kmin,
        kmax=kmax,
        keys=_take(keys, source) if needs.tokens or needs.window else None,
        values=_take(values, source) if needs.tokens else None,
        weights=None if weights is None else weights.gather(-1, source).masked_fill(~filled, 0),
        window=None,
        now=after - 1,
        page_size=size,
        layer=layer,
        first_head=first_head,
    )
    pages = marked(policy.observe(newest, pages, scaling), pages, goes_on)
    if pool is None:
        queries = query.new_zeros((*query.shape[:2], needs.window, query.shape[-1])).detach()
        asked = step.after.new_full((query.shape[0], needs.window), -1)
    else:
        queries, asked = pool.queries, pool.asked
    queries, asked = keep_last(queries, asked, query.detach(), step)
    keep = pages.used
    if policy.pages_kept is not None and start.shape[-1] > policy.pages_kept:
        if needs.window:
            assert pages.keys is not None
            rank = pages.rank.masked_fill(~filled, -1)
            window = window_weights(queries, asked, pages.keys, rank, needs, weigh)
            pages = replace(pages, window=window)
        lasting = torch.zeros_like(pinned) if policy.pins_kept else pinned
        count = policy.pages_kept + (0 if policy.pins_count else lasting.sum(-1, keepdim=True))
        place = ranking(policy.priority(pages), lasting | newest_page, start)
        keep = keep & ((place >= start.shape[-1] - count) | ~goes_on)
    if policy.pins_kept:
        pinned = torch.where(goes_on, keep, pinned)
    held = int(keep.sum(-1).max())
    outside = 0 if policy.pins_count else int((pinned & keep).sum(-1).max())
    most = policy.pages_held
    kept, is_page = _places(start, keep, max(held, 0 if most is None else most + outside))
    source = _take_pages(source, kept, size)
    filled = _take_pages(filled, kept, size) & is_page.repeat_interleave(size, -1)
    return PagePool(
        size=size,
        layer=layer,
        first_head=first_head,
        held=held,
        high=held,
        outside=outside,
        keys=_take(keys, source),
        values=_take(values, source),
        slots=slots.gather(-1, source).masked_fill(~filled, -1),
        start=start.gather(-1, kept).masked_fill(~is_page, -1),
        stamp=pages.stamp.gather(-1, kept),
        sums=_take(pages.sums, kept),
        pinned=pinned.gather(-1, kept) & is_page,
        kmin=None if kmin is None else _take(kmin, kept),
        kmax=None if kmax is None else _take(kmax, kept),
        current=is_page.sum(-1).clamp(min=1) - 1,  # oldest first: the newest is last
        queries=queries,
        asked=asked,
    )


def marked(new: PageView, old: PageView, goes_on: Tensor) -> PageView:
    """`old` with the marks of `new`, in the rows that got a token: bool `[batch, 1, 1]`."""
    return replace(
        old,
        stamp=torch.where(goes_on, new.stamp.to(old.stamp.dtype), old.stamp),
        sums=torch.where(goes_on[..., None], new.sums, old.sums),
    )


def _starts(pool: PagePool | None, step: Step, size: int, heads: int) -> tuple[Tensor, Tensor]:
    """Rank of the first token of the old places and then of each row's new pages, -1 for none.

    int32 `[batch, heads, pages]`; the second is True for each row's newest page.
    """
    before, after = step.before[:, None, None], step.after[:, None, None]
    known, total = -(-before // size), -(-after // size)
    place = torch.arange(int((total - known).max()), device=before.device)
    start = torch.where(place < total - known, (known + place) * size, -1).to(torch.int32)
    start = start.expand(-1, heads, -1)
    if pool is not None:
        start = torch.cat([pool.start[..., : pool.high], start], dim=-1)
    start = start.contiguous()
    return start, (start >= 0) & (start == start.amax(-1, keepdim=True))


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


def _places(start: Tensor, keep: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The pages of `keep`, oldest first, on `count` places: where each comes from, and if any."""
    last = torch.iinfo(start.dtype).max
    order = start.masked_fill(~keep, last).argsort(dim=-1, stable=True)[..., :count]
    order = torch.nn.functional.pad(order, (0, count - order.shape[-1]))
    place = torch.arange(count, device=start.device)
    return order, place < keep.sum(-1, keepdim=True)


def _summaries(keys: Tensor, source: Tensor, filled: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest key of each page, `[batch, kv_heads, pages, head_dim]`; 0 for none."""
    paged = _take(keys, source).unflatten(2, (-1, size))
    empty = ~filled.unflatten(2, (-1, size))[..., None]
    none = empty.all(3)
    kmin = paged.masked_fill(empty, torch.inf).amin(3).masked_fill(none, 0)
    kmax = paged.masked_fill(empty, -torch.inf).amax(3).masked_fill(none, 0)
    return kmin, kmax


def _take(rows: Tensor, places: Tensor) -> Tensor:
    """`[batch, kv_heads, n, d]` to the rows of `places`, `[batch, kv_heads, K]`."""
    return rows.gather(2, places[..., None].expand(-1, -1, -1, rows.shape[-1]))


def _take_pages(places: Tensor, kept: Tensor, size: int) -> Tensor:
    """`[batch, kv_heads, pages * size]` to the pages of `kept`, `[batch, kv_heads, K * size]`."""
    pages = places.unflatten(-1, (-1, size))
    return pages.gather(2, kept[..., None].expand(-1, -1, -1, size)).flatten(2)
