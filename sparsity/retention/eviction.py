"""What a policy notes of each forward, and the order of eviction that follows from it."""

from dataclasses import replace

import torch
from torch import Tensor

from sparsity.policies.base import PageView, Policy
from sparsity.retention.query_weights import Weigh, window_weights


def observe(
    policy: Policy, pages: PageView, query: Tensor, scaling: float, goes_on: Tensor | None
) -> PageView:
    """The pages with the stamps and sums that `policy` gives them after a forward.

    Rows to which the forward brought no real token keep what they had.

    Args:
        policy: the policy that observes.
        pages: the pages held, the new tokens among them.
        query: of each row's newest real token, `[batch, query_heads, head_dim]`.
        scaling: factor on a query-key product before the softmax.
        goes_on: whether the forward brought a real token to each row, bool `[batch]`; None for to
            all.

    Returns:
        `pages` itself where the policy notes nothing.
    """
    noted = policy.observe(query, pages, scaling)
    if noted is pages or goes_on is None:
        return noted
    goes_on = goes_on[:, None, None]
    return replace(
        pages,
        stamp=torch.where(goes_on, noted.stamp.to(pages.stamp.dtype), pages.stamp),
        sums=torch.where(goes_on[..., None], noted.sums, pages.sums),
    )


def eviction_order(
    policy: Policy, pages: PageView, spared: Tensor, queries: Tensor, asked: Tensor, weigh: Weigh
) -> Tensor:
    """The number of each page in the order of eviction: 0 goes first.

    Places without a page come before all others, then the page with the least priority, of equals
    the one with the least `Policy.tie`, of equals in that the oldest; the pages of `spared` come
    last.

    Args:
        policy: the policy whose `priority` decides.
        pages: the pages held.
        spared: bool `[batch, kv_heads, P]`, True for pages that are not evicted.
        queries: the last queries, see `keep_last`; read only if the policy needs a `window`.
        asked: the rank of each of them, see `keep_last`.
        weigh: the layer's own attention weights.

    Returns:
        int64 `[batch, kv_heads, P]`.
    """
    worth = _priority(policy, pages, queries, asked, weigh)
    worth = spare(worth, spared).masked_fill(pages.start < 0, -torch.inf)
    order = pages.start.argsort(dim=-1, stable=True)
    tie = policy.tie(pages)
    for sizes in [worth] if tie is None else [numbers(tie), worth]:
        order = order.gather(-1, sizes.gather(-1, order).argsort(dim=-1, stable=True))
    return order.argsort(-1)


def first_evicted(
    policy: Policy, pages: PageView, queries: Tensor, asked: Tensor, weigh: Weigh
) -> Tensor:
    """The page that is first in `eviction_order`, with the pinned pages spared.

    Args:
        policy: the policy whose `priority` decides.
        pages: the pages held.
        queries: the last queries, see `keep_last`; read only if the policy needs a `window`.
        asked: the rank of each of them, see `keep_last`.
        weigh: the layer's own attention weights.

    Returns:
        Its place, int64 `[batch, kv_heads]`; the first unused place where there is one.
    """
    worth = _priority(policy, pages, queries, asked, weigh)
    if policy.pin_prompt:
        worth = spare(worth, pages.pinned)
    worth = worth.masked_fill(pages.start < 0, -torch.inf)
    worth = ties_broken(policy, pages, worth)
    least = worth.amin(-1, keepdim=True)
    last = torch.iinfo(pages.start.dtype).max
    return pages.start.masked_fill(worth > least, last).argmin(-1)


def ties_broken(policy: Policy, pages: PageView, worth: Tensor) -> Tensor:
    """The worth of pages, raised to infinity where only `Policy.tie` keeps a page from going first.

    Args:
        policy: whose `tie` decides.
        pages: the pages held.
        worth: `[batch, kv_heads, P]`; where places without a page have the least, they keep it.
    """
    tie = policy.tie(pages)
    if tie is None:
        return worth
    least = worth == worth.amin(-1, keepdim=True)
    tie = numbers(tie).masked_fill(pages.start < 0, -torch.inf).masked_fill(~least, torch.inf)
    return worth.masked_fill(least & (tie > tie.amin(-1, keepdim=True)), torch.inf)


def _priority(
    policy: Policy, pages: PageView, queries: Tensor, asked: Tensor, weigh: Weigh
) -> Tensor:
    """The policy's `priority`, shown the window of the last queries if it needs one."""
    if policy.needs.window:
        assert pages.keys is not None
        rank = pages.rank.masked_fill(~pages.filled, -1)
        window = window_weights(queries, asked, pages.keys, rank, policy.needs, weigh)
        pages = replace(pages, window=window)
    return numbers(policy.priority(pages))


def numbers(worth: Tensor) -> Tensor:
    """The worth of pages, where what is not a number is the most that a number can be."""
    return worth.masked_fill(worth.isnan(), torch.finfo(worth.dtype).max)


def spare(worth: Tensor, spared: Tensor) -> Tensor:
    """The worth of pages, with those of `spared` above all others, the infinite among them."""
    return worth.clamp(max=torch.finfo(worth.dtype).max).masked_fill(spared, torch.inf)
