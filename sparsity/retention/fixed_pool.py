"""Decoding in a pool with a fixed number of places: tensor operations only, on shapes that stay.

A step here waits for nothing and branches on nothing that depends on data, so that torch.compile
makes one graph of it, and CUDA graphs replay it. `PagePool.write` and `LayerRetention` do the same
in a pool that grows; the two give the same tokens.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsity.kernels.append import append
from sparsity.kernels.decode_attention import decode_attention
from sparsity.policies.base import PageView, Policy
from sparsity.retention.clock import Clock, keep_address
from sparsity.retention.eviction import eviction_order, numbers, observe, spare, ties_broken
from sparsity.retention.page_pool import PagePool
from sparsity.retention.query_weights import Weigh, keep_query
from sparsity.retention.rotation import Move


def places_of(policy: Policy, max_tokens: int | None) -> int | None:
    """Places for pages that a pool under `policy` needs at most; None for no bound.

    Args:
        policy: of the layer.
        max_tokens: columns that a text may have; None for no bound.
    """
    most = policy.pages_held if policy.pins_count else None
    limits = [] if most is None else [most]
    if max_tokens is not None:
        limits.append(-(-max_tokens // policy.page_size))
    return min(limits, default=None)


def evicts_between_steps(policy: Policy) -> bool:
    """Whether room is made between two steps, by `make_room`, and not in a step.

    A policy that evicts many pages at once, or weighs the last queries anew, does its work once in
    `evict_every` tokens; in a step without branches it would be done for every token.
    """
    decoding = policy.decoding
    kept, held = decoding.pages_kept, decoding.pages_held
    if kept is None or held is None:
        return False
    return held > kept or decoding.needs.window > 0


def fix(pool: PagePool, places: int, into: PagePool | None) -> PagePool:
    """What `pool` holds, in a pool of `places` places.

    Args:
        pool: holds at most `places` pages.
        places: for pages.
        into: a pool of as many places to write to, whose tensors stay where they are; None to
            allocate one.
    """
    batch, heads = pool.start.shape[:2]
    fixed = {} if into is None else into.tensors()
    for name, old in pool.tensors().items():
        if old.dim() < 3 or name == "queries":  # one number a row and head, or the last queries
            new = fixed[name] if name in fixed else old.new_empty(old.shape)
            new.copy_(old)
        else:
            length = places * (pool.size if name in ("keys", "values", "slots") else 1)
            empty = -1 if name in ("slots", "start", "stamp") else 0
            shape = (batch, heads, length, *old.shape[3:])
            new = fixed[name].fill_(empty) if name in fixed else old.new_full(shape, empty)
            have = min(length, old.shape[2])
            new[:, :, :have] = old[:, :, :have]
        fixed[name] = new
    if into is not None:
        return into
    keep_address(*fixed.values())
    return replace(pool, held=places, high=places, outside=0, **fixed)  # type: ignore[arg-type]


def decode(
    pool: PagePool,
    policy: Policy,
    clock: Clock,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    move: Move | None,
) -> Tensor:
    """Store one token for each row, attend, and let the policy observe; all in place.

    Args:
        pool: of `fix`.
        policy: of the layer.
        clock: where the rows are.
        query: `[batch, query_heads, 1, head_dim]`.
        key: of the new token, `[batch, kv_heads, 1, head_dim]`.
        value: of the new token, `[batch, kv_heads, 1, value_dim]`.
        scaling: factor on a query-key product before the softmax.
        softcap: see `sparsity.retention.attention.attend_reference`.
        sinks: see `sparsity.retention.attention.attend_reference`.
        move: rotates keys to other positions, for a policy that needs it.

    Returns:
        `[batch, 1, query_heads, value_dim]`; any finite numbers for a row whose new column is
        padding.
    """
    needs, size = policy.needs, pool.size
    append(
        pool.keys,
        pool.values,
        pool.slots,
        pool.start,
        pool.stamp,
        pool.sums,
        pool.pinned,
        pool.kmin,
        pool.kmax,
        pool.current,
        key[:, :, 0].detach(),
        value[:, :, 0].detach(),
        _worth(pool, policy, clock),
        clock.rank,
        clock.column,
        clock.valid,
        size,
    )
    now = clock.newest
    pages = pool.view(now)
    newest = query[:, :, 0].detach()
    chosen = policy.select(newest, pages)
    keys = pool.keys if move is None else _closed_up(pool, needs.moved, now, move)

    def attend(listed: Tensor | None, weights: bool) -> tuple[Tensor, Tensor | None]:
        return decode_attention(
            query[:, :, 0],
            keys,
            pool.values,
            pool.start,
            now,
            size,
            scaling,
            pages=listed,
            softcap=softcap,
            sinks=sinks,
            weights=needs.group if weights else None,
        )

    observed = needs.attention is not None
    out, weights = attend(chosen, weights=observed and chosen is None)
    if observed and chosen is not None:
        _, weights = attend(None, weights=True)
    pages = replace(pages, weights=weights)
    noted = observe(policy, pages, newest, scaling, clock.goes_on)
    if noted is not pages:
        pool.mark(noted, pages)
    if needs.window:
        keep_query(pool.queries, pool.asked, newest, clock.rank, clock.goes_on)
    return out[:, None]


def rehearse(pool: PagePool, policy: Policy, clock: Clock, **scores: Any) -> None:
    """Build the kernels of a step, on a copy of one row.

    A kernel that does not build is then an error that names it; in a step that torch.compile
    traces it would be an error of the compiler, about a graph.

    Args:
        pool: of `fix`, on a CUDA device; not changed.
        policy: of the layer.
        clock: where the rows are.
        scores: of the layer: `scaling`, `softcap` and `sinks`, see `decode`.
    """
    row = pool.map(lambda tensor: tensor[:1].clone())
    query = row.keys.new_zeros(1, pool.queries.shape[1], 1, row.keys.shape[-1])
    at = Clock(clock.rank[:1].clone(), clock.column.clone(), clock.valid[:1].clone())
    new = query, row.keys[:, :, :1], row.values[:, :, :1]
    decode(row, policy, at, *new, **scores, move=None)


def make_room(pool: PagePool, policy: Policy, clock: Clock, weigh: Weigh) -> None:
    """Evict as the policy does between two steps, in the rows that open a page and are full.

    Args:
        pool: of `fix`.
        policy: of the layer, one that `evicts_between_steps`.
        clock: where the rows are.
        weigh: the layer's own attention weights.
    """
    evicting = policy.decoding
    most, kept = evicting.pages_held, evicting.pages_kept
    assert most is not None
    assert kept is not None
    pages = pool.view(clock.rank)
    full = _full(pages, evicting, most)
    opens = (clock.valid & (clock.rank % pool.size == 0))[:, None, None]
    unused = (~pages.used).sum(-1, keepdim=True)
    order = eviction_order(evicting, pages, pages.pinned, pool.queries, pool.asked, weigh)
    gone = pages.used & (order < unused + most - kept + 1) & full & opens
    pool.start.masked_fill_(gone, -1)
    pool.slots.unflatten(-1, (-1, pool.size)).masked_fill_(gone[..., None], -1)


def steps_left(pool: PagePool, policy: Policy, clock: Clock) -> Tensor:
    """Tokens that may come before `make_room` is due, at least; a number on the device."""
    pages = pool.view(clock.rank)
    most = policy.decoding.pages_held
    assert most is not None
    free = (most - _counted(pages, policy)).amin((1, 2)).clamp(min=0)  # of each row
    inside = -clock.rank % pool.size  # places left in the newest page
    return (free * pool.size + inside).min()


def _worth(pool: PagePool, policy: Policy, clock: Clock) -> Tensor | None:
    """What each page is worth keeping as room is made for a token: float32 `[batch, kv_heads, P]`.

    -inf for places that are taken first, infinite for pages that stay. None where nothing is
    evicted in a step: the first unused place is taken.
    """
    evicting = policy.decoding
    most = evicting.pages_held
    if most is None or evicts_between_steps(policy):
        return None
    pages = pool.view(clock.rank)
    worth = numbers(evicting.priority(pages).float())
    if policy.pin_prompt or policy.pins_kept:  # pinned pages stay even where all others are spared
        worth = spare(worth, pages.pinned)
    unused: Tensor | float = -torch.inf
    if not policy.pins_count:  # then a row may be full where places are unused
        unused = torch.where(_full(pages, evicting, most), torch.inf, -torch.inf)
    return ties_broken(evicting, pages, torch.where(pages.used, worth, unused))


def _full(pages: PageView, policy: Policy, most: int) -> Tensor:
    """Whether a KV head holds `most` pages, of those that count: bool `[batch, kv_heads, 1]`."""
    return _counted(pages, policy) >= most


def _counted(pages: PageView, policy: Policy) -> Tensor:
    """Pages of a KV head that count against the budget: int64 `[batch, kv_heads, 1]`."""
    counted = pages.used if policy.pins_count else pages.used & ~pages.pinned
    return counted.sum(-1, keepdim=True)


def _closed_up(pool: PagePool, count: int, now: Tensor, move: Move) -> Tensor:
    """The keys, the first `count` of them rotated to stand right before the others held.

    See `LayerRetention._closed_up`; the first tokens lie in the first places.
    """
    evicted = now[:, None] + 1 - (pool.start >= 0).sum(-1)
    rank = pool.start[..., :count].clamp(min=0).long()
    moved = move(pool.keys[:, :, :count], rank, rank + evicted[..., None])
    return torch.cat([moved, pool.keys[:, :, count:]], dim=2)
