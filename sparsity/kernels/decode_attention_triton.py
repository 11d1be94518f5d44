# mypy: allow-untyped-defs
"""The kernels of `sparsity.kernels.decode_attention`: parts of the keys, then their join.

Scores are in units of log 2 throughout, since the device raises 2 to a power.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsity.kernels.operator import launcher, operator

MOST_SPLITS = 64
WAVES = 2  # programs for each processor
WIDEST_TILE = 32 * 1024  # bytes of keys and values that a program holds at once
SHARED_BYTES = 160 * 1024  # for the keys and values that are on their way
MOST_UNTRIMMED = 4096  # tokens


@triton.jit
def split_kernel(
    query,
    keys,
    values,
    start,
    now,
    pages,
    sinks,
    out,
    partial,
    lse,
    scores,
    query_b,
    query_h,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    start_b,
    start_h,
    listed,
    tokens,
    splits,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    S: tl.constexpr,
    S_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
    SINKS: tl.constexpr,
    SCORES: tl.constexpr,
    TRIM: tl.constexpr,
    OWN_PAD: tl.constexpr,
    DIRECT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Attention over every `splits`-th tile of BLOCK tokens, pages padded to a power of two.

    TRIM reads no key of a place that is empty and stops at the last page, for pools with room.
    DIRECT is for a single part, which needs no join. WIDE multiplies in float32, for Triton's
    interpreter, which knows no product of bfloat16.
    """
    LOG2: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = row // H
    h = row % H
    newest = tl.load(now + b)
    d = tl.arange(0, D_PAD)
    dv = tl.arange(0, DV_PAD)
    g = tl.arange(0, G_PAD)
    heads = h * G + g
    q_at = query + b * query_b + heads[:, None] * query_h + d[None, :]
    q = tl.load(q_at, mask=(g < G)[:, None] & (d < D)[None, :], other=0).to(keys.dtype.element_ty)
    if WIDE:
        q = q.to(tl.float32)
    lane = tl.arange(0, BLOCK)
    starts = start + b * start_b + h * start_h
    keys_at = keys + b * key_b + h * key_h
    values_at = values + b * value_b + h * value_h

    end = tl.cdiv(listed * S_PAD, BLOCK)
    if TRIM:
        PAGES: tl.constexpr = max(1, BLOCK // S_PAD)  # a tile
        own = tl.arange(0, OWN_PAD)
        own_page = (split + (own // PAGES) * splits) * BLOCK // S_PAD + own % PAGES
        own_start = tl.load(starts + own_page, mask=own_page < listed, other=-1)
        rounds = tl.max(tl.where(own_start >= 0, own // PAGES + 1, 0), 0)
        end = tl.minimum(end, split + rounds * splits)

    most = tl.full([G_PAD], float("-inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, DV_PAD], tl.float32)
    for tile in range(split, end, splits):
        at = (tile * BLOCK + lane) // S_PAD
        inside = (tile * BLOCK + lane) % S_PAD
        wanted = (at < listed) & (inside < S)
        page = at
        if LISTED:
            page = tl.load(pages + row * listed + at, mask=wanted, other=0).to(tl.int32)
        begun = tl.load(starts + page, mask=wanted, other=-1)
        held = wanted & (begun >= 0) & (begun + inside <= newest)
        read = held if TRIM else wanted
        token = page * S + inside
        k_at = keys_at + token[:, None] * key_n + d[None, :]
        k = tl.load(k_at, mask=read[:, None] & (d < D)[None, :], other=0)
        if WIDE:
            k = k.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        if CAP > 0:
            e = tl.exp2(tl.abs(s) * (-2.0 * LOG2 / CAP))
            s = tl.where(s < 0, -CAP, CAP) * ((1.0 - e) / (1.0 + e))
        s = tl.where(held[None, :], s * LOG2, float("-inf"))
        if SCORES:
            s_at = scores + (row * G + g)[:, None] * tokens + token[None, :]
            tl.store(s_at, s, mask=(g < G)[:, None] & wanted[None, :])
        higher = tl.maximum(most, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(most - base)
        total = total * fade + tl.sum(p, 1)
        v_at = values_at + token[:, None] * value_n + dv[None, :]
        v = tl.load(v_at, mask=read[:, None] & (dv < DV)[None, :], other=0)
        acc = acc * fade[:, None]
        p = p.to(v.dtype)
        if WIDE:
            p, v = p.to(tl.float32), v.to(tl.float32)
        acc = tl.dot(p, v, acc, input_precision="ieee")
        most = higher

    if DIRECT and SINKS:
        sink = tl.load(sinks + heads, mask=g < G, other=0).to(tl.float32) * LOG2
        base = tl.where(most == float("-inf"), sink, most)
        total = total + tl.exp2(sink - base)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    mask = (g < G)[:, None] & (dv < DV)[None, :]
    if DIRECT:
        tl.store(out + (row * G + g)[:, None] * DV + dv[None, :], acc, mask=mask)
    else:
        part = (row * G + g) * splits + split
        tl.store(partial + part[:, None] * DV + dv[None, :], acc, mask=mask)
        tl.store(lse + part, most + tl.log2(total), mask=g < G)


@triton.jit
def join(
    partial,
    lse,
    sinks,
    out,
    row,
    part,
    H: tl.constexpr,
    G: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    SINKS: tl.constexpr,
):
    """The output of one query head from its parts."""
    LOG2: tl.constexpr = 1.4426950408889634
    head = row * G + part
    split = tl.arange(0, SPLITS_PAD)
    dv = tl.arange(0, DV_PAD)
    at = partial + (head * SPLITS + split)[:, None] * DV + dv[None, :]
    parts = tl.load(at, mask=(split < SPLITS)[:, None] & (dv < DV)[None, :], other=0)
    logs = tl.load(lse + head * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    most = tl.max(logs, 0)
    if SINKS:
        sink = tl.load(sinks + (row % H) * G + part).to(tl.float32) * LOG2
        most = tl.maximum(most, sink)
    base = tl.where(most == float("-inf"), 0.0, most)
    share = tl.exp2(logs - base)
    total = tl.sum(share, 0)
    if SINKS:
        total += tl.exp2(sink - base)
    joined = tl.sum(parts * share[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + head * DV + dv, joined, mask=dv < DV)


@triton.jit
def weigh(
    lse,
    scores,
    starts,
    now,
    sinks,
    weights,
    row,
    first,
    tokens,
    H: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    S: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
    MAX: tl.constexpr,
):
    """The weights of BLOCK tokens from `first` on, reduced over the query heads of the group."""
    LOG2: tl.constexpr = 1.4426950408889634
    g = tl.arange(0, G_PAD)
    split = tl.arange(0, SPLITS_PAD)
    parts = (row * G + g)[:, None] * SPLITS + split[None, :]
    there = (g < G)[:, None] & (split < SPLITS)[None, :]
    logs = tl.load(lse + parts, mask=there, other=float("-inf"))
    token = first + tl.arange(0, BLOCK)
    begun = tl.load(starts + token // S, mask=token < tokens, other=-1)
    held = (begun >= 0) & (begun + token % S <= tl.load(now + row // H))
    at = scores + (row * G + g)[:, None] * tokens + token[None, :]
    s = tl.load(at, mask=(g < G)[:, None] & held[None, :], other=float("-inf"))
    most = tl.max(logs, 1)
    if SINKS:
        sink = tl.load(sinks + (row % H) * G + g, mask=g < G, other=0).to(tl.float32) * LOG2
        most = tl.maximum(most, sink)
    base = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(tl.exp2(logs - base[:, None]), 1)
    if SINKS:
        total += tl.exp2(sink - base)
    whole = base + tl.log2(tl.where(total == 0, 1.0, total))
    weight = tl.exp2(s - whole[:, None])
    reduced = tl.max(weight, 0) if MAX else tl.sum(weight, 0) / G
    tl.store(weights + row * tokens + token, reduced, mask=token < tokens)


@triton.jit
def combine_kernel(
    partial,
    lse,
    scores,
    start,
    now,
    sinks,
    out,
    weights,
    start_b,
    start_h,
    tokens,
    H: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    S: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
    MAX: tl.constexpr,
):
    """The first G programs of a row join the parts of a query head, the others weigh tokens."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part < G:
        join(partial, lse, sinks, out, row, part, H, G, DV, DV_PAD, SPLITS, SPLITS_PAD, SINKS)
    else:
        first = (part - G) * BLOCK
        starts = start + (row // H) * start_b + (row % H) * start_h
        weigh(lse, scores, starts, now, sinks, weights, row, first, tokens,
              H, G, G_PAD, S, SPLITS, SPLITS_PAD, BLOCK, SINKS, MAX)  # fmt: skip


class Plan(NamedTuple):
    """How the keys are laid over the device, from shapes alone.

    Args:
        tile: tokens a tile, a power of two of at least 16.
        splits: parts of the keys of a row and KV head.
        warps: a program.
        stages: tiles on their way at once.
        trim: see `split_kernel`.
    """

    tile: int
    splits: int
    warps: int
    stages: int
    trim: bool


def plan(rows: int, listed: int, page_size: int, token_bytes: int, processors: int) -> Plan:
    """The plan for `rows` (batch times KV heads) that attend to `listed` pages each.

    Args:
        rows: batch times KV heads.
        listed: pages a row attends to.
        page_size: tokens a page.
        token_bytes: of a key and a value, each padded to a power of two.
        processors: of the device.
    """
    tile = max(16, min(64, WIDEST_TILE // triton.next_power_of_2(token_bytes)))
    tiles = max(1, triton.cdiv(listed * triton.next_power_of_2(page_size), tile))
    splits = max(1, min(round(WAVES * processors / rows), tiles, MOST_SPLITS))
    splits = triton.cdiv(tiles, triton.cdiv(tiles, splits))  # as many, none without a tile
    stages = max(1, min(3, SHARED_BYTES // (tile * token_bytes)))
    # Where many places may be empty, reading them is dearer than waiting to know.
    return Plan(tile, splits, 4, stages, trim=listed * page_size > MOST_UNTRIMMED)


def processors_of(tensor: Tensor) -> int:
    """Streaming multiprocessors of the device that holds the tensor."""
    if not tensor.is_cuda:
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


@operator("sparsity::decode_attention", mutates_args=())
def decode_attention_op(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    now: Tensor,
    page_size: int,
    scaling: float,
    pages: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    weights: str | None,
    tile: int = 0,
    splits: int = 0,
    warps: int = 0,
    stages: int = 0,
    trim: bool = False,
) -> tuple[Tensor, Tensor]:
    """`decode_attention` by the kernels; a `tile` of 0 takes the plan of `plan`.

    Without weights the second result is empty.
    """
    batch, heads, tokens, head_dim = keys.shape
    value_dim, groups = values.shape[-1], query.shape[1] // heads
    query = query if query.stride(-1) == 1 else query.contiguous()
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    values = values if values.stride(-1) == 1 else values.contiguous()
    start = start if start.stride(-1) == 1 else start.contiguous()
    listed = start.shape[-1] if pages is None else pages.shape[-1]
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    padded_value = max(16, triton.next_power_of_2(value_dim))
    chosen = Plan(tile, splits, warps, stages, trim)
    if not tile:
        token_bytes = (padded_dim + padded_value) * keys.element_size()
        chosen = plan(batch * heads, listed, page_size, token_bytes, processors_of(keys))
    direct = chosen.splits == 1 and weights is None
    out = values.new_empty(batch, heads * groups, value_dim)
    partial, lse, scores, reduced = (_empty(query, 0) for _ in range(4))
    if not direct:
        partial = _empty(query, batch, heads, groups, chosen.splits, value_dim)
        lse = _empty(query, batch, heads, groups, chosen.splits)
    if weights is not None:
        scores = _empty(query, batch, heads, groups, tokens)
        reduced = _empty(query, batch, heads, tokens)
    sink = _empty(query, 0) if sinks is None else sinks
    padded_group = max(16, triton.next_power_of_2(groups))
    padded_page = triton.next_power_of_2(page_size)
    rounds = triton.cdiv(triton.cdiv(listed * padded_page, chosen.tile), chosen.splits)
    launcher(split_kernel)[(batch * heads, chosen.splits)](
        query,
        keys,
        values,
        start,
        now,
        _empty(query, 0) if pages is None else pages.contiguous(),
        sink,
        out,
        partial,
        lse,
        scores,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        start.stride(0),
        start.stride(1),
        listed,
        tokens,
        chosen.splits,
        SCALE=scaling,
        CAP=softcap or 0.0,
        H=heads,
        G=groups,
        G_PAD=padded_group,
        D=head_dim,
        D_PAD=padded_dim,
        DV=value_dim,
        DV_PAD=padded_value,
        S=page_size,
        S_PAD=padded_page,
        BLOCK=chosen.tile,
        LISTED=pages is not None,
        SINKS=sinks is not None,
        SCORES=weights is not None,
        TRIM=chosen.trim and pages is None,
        OWN_PAD=triton.next_power_of_2(rounds * max(1, chosen.tile // padded_page)),
        DIRECT=direct,
        WIDE=not keys.is_cuda,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    if direct:
        return out, reduced
    weighed = 0 if weights is None else triton.cdiv(tokens, 128)
    launcher(combine_kernel)[(batch * heads, groups + weighed)](
        partial,
        lse,
        scores,
        start,
        now,
        sink,
        out,
        reduced,
        start.stride(0),
        start.stride(1),
        tokens,
        H=heads,
        G=groups,
        G_PAD=triton.next_power_of_2(groups),
        DV=value_dim,
        DV_PAD=padded_value,
        S=page_size,
        SPLITS=chosen.splits,
        SPLITS_PAD=triton.next_power_of_2(chosen.splits),
        BLOCK=128,
        SINKS=sinks is not None,
        MAX=weights == "max",
        num_warps=4,
    )
    return out, reduced


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Float32 on the device of another tensor; of no elements where a kernel needs no tensor."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)
