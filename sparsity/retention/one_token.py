"""A token written where all rows are at the same rank: what `PagePool.write` does, in few calls.

No row is padded then, so that the place inside the page is a number, every row opens a page or
none does, and no row has to keep what it has. `PagePool.write` is the slow twin, which takes rows
that differ.
"""

import torch
from torch import Tensor

from sparsity.policies.base import Policy
from sparsity.retention.batch_rows import Step
from sparsity.retention.eviction import first_evicted
from sparsity.retention.page_pool import PagePool
from sparsity.retention.query_weights import Weigh


def write(
    pool: PagePool, key: Tensor, value: Tensor, step: Step, policy: Policy, weigh: Weigh
) -> None:
    """`PagePool.write`, in few calls where it can be; arguments as there."""
    (write_alike if step.alike else PagePool.write)(pool, key, value, step, policy, weigh)


def write_alike(
    pool: PagePool, key: Tensor, value: Tensor, step: Step, policy: Policy, weigh: Weigh
) -> None:
    """`PagePool.write` for a step whose rows are alike.

    Args:
        pool: written to in place.
        key: `[batch, kv_heads, 1, head_dim]`.
        value: `[batch, kv_heads, 1, value_dim]`.
        step: the forward, with `Step.alike`.
        policy: the one that evicts while decoding.
        weigh: the layer's own attention weights.
    """
    size, rank = pool.size, step.longest_before
    inside = rank % size
    page = _flat(pool.current, pool) if inside else _open(pool, step, policy, weigh)
    token = page if size == 1 else page * size + inside
    new = key.reshape(-1, key.shape[-1])
    pool.keys.view(-1, key.shape[-1]).index_copy_(0, token, new)
    pool.values.view(-1, value.shape[-1]).index_copy_(0, token, value.reshape(-1, value.shape[-1]))
    pool.slots.view(-1).index_fill_(0, token, step.stop - 1)
    if pool.kmin is not None and pool.kmax is not None:
        low, high = pool.kmin.view(-1, key.shape[-1]), pool.kmax.view(-1, key.shape[-1])
        least, most = new, new
        if inside:
            least = torch.minimum(low.index_select(0, page), new)
            most = torch.maximum(high.index_select(0, page), new)
        low.index_copy_(0, page, least)
        high.index_copy_(0, page, most)


def _open(pool: PagePool, step: Step, policy: Policy, weigh: Weigh) -> Tensor:
    """Give an empty page to every row; its index among all places, int64 `[batch * kv_heads]`."""
    rank, most = step.longest_before, policy.pages_held
    full = most is not None and pool.held - pool.outside >= most
    if full and policy.pins_count and most == policy.pages_kept and pool.held == pool.high:
        # One page goes, and no other place is free: the new page takes its place.
        pages = pool.view(step.before)
        pool.current = first_evicted(policy, pages, pool.queries, pool.asked, weigh)
        page = _flat(pool.current, pool)
        if pool.size > 1:
            pool.slots.view(-1, pool.size).index_fill_(0, page, -1)
    else:
        pool.make_room(step.before.new_ones(1, 1, dtype=torch.bool), step, policy, weigh)
        pool.current = pool.start[..., : pool.high].argmin(-1)  # the first of those at -1
        page = _flat(pool.current, pool)
    pool.start.view(-1).index_fill_(0, page, rank)
    pool.stamp.view(-1).index_fill_(0, page, rank)
    if sums := pool.sums.shape[-1]:
        pool.sums.view(-1, sums).index_fill_(0, page, 0)
    pool.pinned.view(-1).index_fill_(0, page, False)
    return page


def _flat(place: Tensor, pool: PagePool) -> Tensor:
    """Places `[batch, kv_heads]` counted through all rows and KV heads.

    They are indices of the pool's tensors, seen as ``view(-1, ...)``.
    """
    places = pool.start.shape[-1]
    first = torch.arange(0, place.numel() * places, places, device=place.device)
    return first + place.reshape(-1)
