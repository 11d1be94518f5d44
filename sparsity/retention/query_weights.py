"""Attention weights for policies: of the newest query, of all, or of the last ones."""

import torch
from torch import Tensor

from sparsity.policies.base import Needs, reduce_group
from sparsity.retention.attention import Weigh
from sparsity.retention.batch_rows import Step
from sparsity.retention.lazy_mask import LazyMask

BLOCK = 128  # queries whose weights are in memory at once
AT_ONCE = 2**24  # weights in memory at once on a device, where every operation costs a launch
FIRST = 4  # tokens of a text among which its attention sinks are (StreamingLLM, arXiv 2309.17453)
OF_AT_LEAST = 64  # tokens of a prompt; of fewer the first ones have a large share anyway


def forward_weights(
    query: Tensor, newest: Tensor, keys: Tensor, slots: Tensor, step: Step, mask: LazyMask,
    needs: Needs, weigh: Weigh,
) -> Tensor:  # fmt: skip
    """Attention weights of a forward over the keys held, as `Needs.attention` asks for them.

    Memory is linear in n: the sum over all queries is taken in blocks. Under plain causality a
    block is not multiplied with the keys of this forward that come after it.

    Args:
        query: of this forward, `[batch, query_heads, q, head_dim]`.
        newest: the query of each row's newest real token, `[batch, query_heads, head_dim]`.
        keys: `[batch, kv_heads, n, head_dim]`, those of this forward last, in order.
        slots: the columns of the keys, -1 for none, `[batch, kv_heads or 1, n]`.
        step: the forward.
        mask: of the forward.
        needs: says which queries, and how to reduce over a group.
        weigh: the layer's own attention weights.

    Returns:
        `[batch, kv_heads, n]`.
    """
    if needs.attention == "newest" or query.shape[2] == 1:
        allowed = (slots >= 0)[:, :, None]
        return reduce_group(weigh(newest[:, :, None], keys, allowed), needs.group)[:, :, 0]
    first, length = step.stop - step.queries, keys.shape[2]
    total = keys.new_zeros(keys.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    size = block_size(query, keys)
    for start in range(0, step.queries, size):
        block = slice(start, min(start + size, step.queries))
        columns = torch.arange(first + block.start, first + block.stop, device=keys.device)
        reach = slice(length if mask.rule is not None else length - (step.queries - block.stop))
        allowed = mask(columns, slots[..., reach])
        weights = weigh(query[:, :, block], keys[:, :, reach], allowed)
        weights = reduce_group(weights, needs.group)
        if step.valid is not None:  # the queries of padding say nothing
            real = step.valid[:, columns - step.first]
            weights = weights * real[:, None, :, None]
        total[..., reach] += weights.sum(2)
    return total


def block_size(query: Tensor, keys: Tensor) -> int:
    """Queries of a block of `forward_weights`: as many as fit `AT_ONCE`, `BLOCK` at least.

    On a CPU `BLOCK`, whose weights stay in its caches.
    """
    if keys.device.type == "cpu":
        return BLOCK
    return max(BLOCK, AT_ONCE // (query.shape[0] * query.shape[1] * keys.shape[2]))


def on_first(newest: Tensor, keys: Tensor, slots: Tensor, step: Step, weigh: Weigh) -> Tensor:
    """Share of the newest query that goes to the first `FIRST` tokens of its text, a scalar.

    The mean over heads and over rows of `OF_AT_LEAST` tokens; NaN where there is no such row.

    Args:
        newest: the query of each row's last token, `[batch, query_heads, head_dim]`.
        keys: of all tokens so far, none of them evicted, `[batch, kv_heads, n, head_dim]`.
        slots: the columns of the keys, -1 for none, `[batch, kv_heads or 1, n]`; n is `FIRST` or
            more.
        step: the forward.
        weigh: the layer's own attention weights.
    """
    held = slots >= 0
    weights = reduce_group(weigh(newest[:, :, None], keys, held[:, :, None]), "mean")[:, :, 0]
    columns = slots.masked_fill(~held, torch.iinfo(slots.dtype).max)
    last = columns.topk(FIRST, largest=False).values[..., -1:]
    shares = weights.masked_fill(~held | (columns > last), 0).sum(-1).mean(1)
    return shares.masked_fill(step.after < OF_AT_LEAST, torch.nan).nanmean()


def keep_last(queries: Tensor, asked: Tensor, query: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """The queries of each row's W newest tokens after a forward.

    The query of rank r is kept at index r % W.

    Args:
        queries: those kept so far, `[batch, query_heads, W, head_dim]`.
        asked: the rank of each, -1 for none; int64 `[batch, W]`.
        query: of the last `step.queries` columns of the forward.
        step: the forward.

    Returns:
        The new `queries` and `asked`, in memory of their own; of length 0 the same ones.
    """
    size, batch = asked.shape[1], asked.shape[0]
    if not size:
        return queries, asked
    key = (keep_last, size, query.device)  # the same in all layers
    if key not in step.shared:
        step.shared[key] = _newest_ranks(step, size, query.device)
    fresh, known, rank, column = step.shared[key]
    asking = column[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    new = query.gather(2, asking)
    queries = torch.where(known[:, None, :, None], new, queries)
    return queries, torch.where(fresh, rank, asked.expand(batch, -1))


def _newest_ranks(
    step: Step, size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a forward brings to each of the W indices of `keep_last`, all `[batch, W]`.

    Returns:
        Whether it brings a token, whether with a query, its rank (-1 without a query), and its
        query's index among those of the forward (0 without).
    """
    index = torch.arange(size, device=device)
    after, before = step.after[:, None], step.before[:, None]
    rank = after - 1 - (after - 1 - index) % size  # the newest rank that belongs at this index
    fresh = rank >= before
    column = (rank - before).clamp(min=0)
    if step.order is None:
        column = torch.zeros_like(column)
    else:
        column = step.order.gather(1, column.clamp(max=step.order.shape[1] - 1))
        column = column - (step.order.shape[1] - step.queries)
    known = fresh & (column >= 0)  # tokens of a past cache come without a query
    return fresh, known, torch.where(known, rank, -1), column.clamp(min=0)


def keep_newest(queries: Tensor, asked: Tensor, query: Tensor, step: Step) -> None:
    """`keep_last` for a forward of one column, in place: only the query that changes is written."""
    if step.alike:
        at = step.longest_before % asked.shape[1]
        queries[:, :, at].copy_(query[:, :, -1])
        asked[:, at].fill_(step.longest_before)
        return
    valid = None if step.valid is None else step.valid[:, -1]
    keep_query(queries, asked, query[:, :, -1], step.before, valid)


def keep_query(
    queries: Tensor, asked: Tensor, query: Tensor, rank: Tensor, valid: Tensor | None
) -> None:
    """Keep one query of each row, in place, where `keep_last` does.

    Args:
        queries: see `keep_last`.
        asked: see `keep_last`.
        query: `[batch, query_heads, head_dim]`.
        rank: its rank in each row, int64 `[batch]`.
        valid: False for rows that keep what they have, bool `[batch]`; None for none.
    """
    row, index = torch.arange(asked.shape[0], device=query.device), rank % asked.shape[1]
    if valid is not None:
        query = torch.where(valid[:, None, None], query, queries[row, :, index])
        rank = torch.where(valid, rank, asked[row, index])
    queries[row, :, index] = query
    asked[row, index] = rank


def window_weights(
    queries: Tensor, asked: Tensor, keys: Tensor, rank: Tensor, needs: Needs, weigh: Weigh
) -> Tensor:
    """Attention weights of the last queries over the tokens held.

    Args:
        queries: see `keep_last`.
        asked: see `keep_last`; a query attends to tokens that are not newer than itself.
        keys: `[batch, kv_heads, n, head_dim]`.
        rank: of each key's token, -1 for none, `[batch, kv_heads, n]`.
        needs: says how to reduce over a group.
        weigh: the layer's own attention weights.

    Returns:
        `[batch, kv_heads, W, n]`.
    """
    allowed = (rank >= 0)[:, :, None] & (rank[:, :, None] <= asked[:, None, :, None])
    return reduce_group(weigh(queries, keys, allowed), needs.group)
