"""The three steps by which a page pool takes in several tokens: lay out, observe, prune.

`PagePool.rebuilt` goes through them; observing is `sparsity.retention.eviction.observe`, as it is
for a single token. Nothing here changes a tensor in place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.policies.base import PageView, Policy
from sparsity.retention.batch_rows import Step
from sparsity.retention.eviction import eviction_order
from sparsity.retention.query_weights import Weigh


@dataclass(frozen=True)
class SeveralTokens:
    """A forward of several tokens in one layer, as its attention saw it.

    n tokens of the pool's places in use stand before the T new columns.

    Args:
        step: the forward.
        keys: `[batch, kv_heads, n + T, head_dim]`, without gradient.
        values: `[batch, kv_heads, n + T, value_dim]`, without gradient.
        slots: the column of each key, int32 `[batch, kv_heads, n + T]`, -1 for none.
        query: of the last q columns, `[batch, query_heads, q, head_dim]`, without gradient.
        newest: the query of each row's newest real token, `[batch, query_heads, head_dim]`.
        weights: attention over the keys, `[batch, kv_heads, n + T]`; None where the policy needs
            no `attention`.
        scaling: factor on a query-key product before the softmax.
        weigh: the layer's own attention weights.
    """

    step: Step
    keys: Tensor
    values: Tensor
    slots: Tensor
    query: Tensor
    newest: Tensor
    weights: Tensor | None
    scaling: float
    weigh: Weigh


@dataclass(frozen=True)
class Layout:
    """Where pages and tokens lie before anything is pruned: the old places, then the new pages.

    Args:
        pages: the P pages, as a policy sees them.
        source: index in `SeveralTokens.keys` of the token in each place, int64
            `[batch, kv_heads, P * page_size]`; 0 where `pages.filled` is False.
        newest: True for each row's newest page, bool `[batch, kv_heads, P]`.
    """

    pages: PageView
    source: Tensor
    newest: Tensor


def lay_out(old: PageView, new: SeveralTokens, policy: Policy) -> Layout:
    """First step: the new tokens fill up each row's newest page and go on in new ones.

    A new page is stamped with the rank of its first token.

    Args:
        old: the pages that the pool holds.
        new: what the forward brings.
        policy: of the layer.
    """
    size, needs, step = old.page_size, policy.needs, new.step
    start, newest, source, filled = _places(old, step, size)
    known = old.start.shape[-1]
    stamp = start.clone()
    sums = old.sums.new_zeros((*start.shape, needs.sums))
    pinned = torch.zeros_like(start, dtype=torch.bool)
    stamp[..., :known], sums[:, :, :known], pinned[..., :known] = old.stamp, old.sums, old.pinned
    if policy.pin_prompt:  # a page that holds any of the new tokens
        before, after = step.before[:, None, None], step.after[:, None, None]
        pinned |= (start >= 0) & (start + size > before) & (after > before)
    kmin, kmax = _summaries(new.keys, source, filled, size) if needs.summaries else (None, None)
    weights = new.weights
    pages = PageView(
        start=start,
        stamp=stamp,
        sums=sums,
        pinned=pinned,
        filled=filled,
        kmin=kmin,
        kmax=kmax,
        keys=take_tokens(new.keys, source) if needs.tokens or needs.window else None,
        values=take_tokens(new.values, source) if needs.tokens else None,
        weights=None if weights is None else weights.gather(-1, source).masked_fill(~filled, 0),
        window=None,
        now=old.now,
        page_size=size,
        layer=old.layer,
        first_head=old.first_head,
    )
    return Layout(pages, source, newest)


def prune(
    layout: Layout,
    pages: PageView,
    new: SeveralTokens,
    policy: Policy,
    queries: Tensor,
    asked: Tensor,
) -> tuple[Tensor, Tensor]:
    """Third step: which pages are kept, and which of them are pinned from now on.

    Rows to which the forward brought no real token keep everything.

    Args:
        layout: of the first step.
        pages: its pages with the marks of the second.
        new: what the forward brings.
        policy: of the layer.
        queries: the last queries, those of this forward among them, see `keep_last`.
        asked: their ranks.

    Returns:
        Two bool `[batch, kv_heads, P]`: True for pages kept; True for pages pinned.
    """
    goes_on = (new.step.after > new.step.before)[:, None, None]
    keep, pinned, count = pages.used, pages.pinned, policy.pages_kept
    if count is not None and pages.start.shape[-1] > count:
        lasting = torch.zeros_like(pinned) if policy.pins_kept else pinned
        order = eviction_order(policy, pages, lasting | layout.newest, queries, asked, new.weigh)
        most = count + (0 if policy.pins_count else lasting.sum(-1, keepdim=True))
        keep = keep & ((order >= pages.start.shape[-1] - most) | ~goes_on)
    if policy.pins_kept:
        pinned = torch.where(goes_on, keep, pinned)
    return keep, pinned


def left_of_a_prompt(policy: Policy, pages: int) -> tuple[int, int]:
    """What `prune` leaves of a first prompt whose rows are alike; the device need not be asked.

    Args:
        policy: of the layer.
        pages: of each row.

    Returns:
        Pages held, and those of them that do not count against the budget.
    """
    kept, pins_all = policy.pages_kept, policy.pin_prompt and not policy.pins_kept
    held = pages if kept is None or (pins_all and not policy.pins_count) else min(pages, kept)
    pins = policy.pin_prompt or policy.pins_kept
    return held, held if pins and not policy.pins_count else 0


def kept_places(start: Tensor, keep: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The pages of `keep`, oldest first, on `count` places.

    Args:
        start: rank of each page's first token, `[batch, kv_heads, P]`.
        keep: bool `[batch, kv_heads, P]`.
        count: places there are to be.

    Returns:
        The old place of each, int64 `[batch, kv_heads, count]`, and whether there is one, bool.
    """
    last = torch.iinfo(start.dtype).max
    order = start.masked_fill(~keep, last).argsort(dim=-1, stable=True)[..., :count]
    order = torch.nn.functional.pad(order, (0, count - order.shape[-1]))
    place = torch.arange(count, device=start.device)
    return order, place < keep.sum(-1, keepdim=True)


def take_tokens(tokens: Tensor, places: Tensor) -> Tensor:
    """`tokens` `[batch, kv_heads, n, d]` at `places` `[batch, kv_heads, K]`."""
    return tokens.gather(2, places[..., None].expand(-1, -1, -1, tokens.shape[-1]))


def take_pages(tokens: Tensor, pages: Tensor, size: int) -> Tensor:
    """`tokens` `[batch, kv_heads, P * size]` of the pages at `pages` `[batch, kv_heads, K]`."""
    paged = tokens.unflatten(-1, (-1, size))
    return paged.gather(2, pages[..., None].expand(-1, -1, -1, size)).flatten(2)


def _places(old: PageView, step: Step, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_starts` gives, and then `_source`; layers that hold nothing yet share it."""
    key = (_places, size, old.start.shape, old.start.device)
    if key not in step.shared:
        start, newest = _starts(old.start, step, size)
        found = (start, newest, *_source(start, step, size, old.filled.shape[-1]))
        if old.start.shape[-1]:
            return found
        step.shared[key] = found
    return step.shared[key]


def _starts(old: Tensor, step: Step, size: int) -> tuple[Tensor, Tensor]:
    """Rank of the first token of each page, of the `old` pages and then of each row's new ones.

    Returns:
        int32 `[batch, kv_heads, P]`, -1 for none; and bool of the same shape, True for each row's
        newest page.
    """
    before, after = step.before[:, None, None], step.after[:, None, None]
    known, total = -(-before // size), -(-after // size)
    if step.then.ragged:
        most = int((total - known).max())
    else:  # the device need not be asked
        most = -(-step.longest_after // size) - -(-step.longest_before // size)
    place = torch.arange(most, device=before.device)
    start = torch.where(place < total - known, (known + place) * size, -1).to(torch.int32)
    start = torch.cat([old, start.expand(-1, old.shape[1], -1)], dim=-1)
    return start, (start >= 0) & (start == start.amax(-1, keepdim=True))


def _source(start: Tensor, step: Step, size: int, old: int) -> tuple[Tensor, Tensor]:
    """Where each place's token comes from: among the `old` places for tokens, then the new columns.

    Returns:
        int64 `[batch, kv_heads, P * size]`, 0 for no token; and bool, False for no token.
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


def _summaries(keys: Tensor, source: Tensor, filled: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest key of each page, `[batch, kv_heads, P, head_dim]`; 0 for none."""
    paged = take_tokens(keys, source).unflatten(2, (-1, size))
    empty = ~filled.unflatten(2, (-1, size))[..., None]
    none = empty.all(3)
    kmin = paged.masked_fill(empty, torch.inf).amin(3).masked_fill(none, 0)
    kmax = paged.masked_fill(empty, -torch.inf).amax(3).masked_fill(none, 0)
    return kmin, kmax
