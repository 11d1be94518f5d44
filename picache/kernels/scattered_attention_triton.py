# mypy: allow-untyped-defs
"""The kernels of `picache.kernels.scattered_attention`: parts of the keys, then their join.

The query heads that share a KV head are rows of one tile: row r and head g of the group are line
``r * G + g``. Scores are in units of log 2 throughout, since the device raises 2 to a power.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WAVES = 3  # programs of 8 warps for each processor
MOST_SPLITS = 64
# Keys of a part, for each line of a tile: fewer are not worth what it takes to join it.
LEAST_KEYS = 16
# Keys of a part at most: programs of rows early in the prompt end sooner, so that there are to be
# more of them, up to so many for each processor.
MOST_KEYS, EVEN_WAVES = 16384, 16
LONG = 16384  # keys from which on the largest tiles are the fastest
POSITIONS = tl.constexpr(1024)  # read at once
LOWEST = tl.constexpr(-3.4e38)  # below every score, and finite: its difference to -inf is no NaN


@triton.jit
def visit(
    query,
    position,
    most,
    total,
    acc,
    keys,
    values,
    key_n,
    value_n,
    begin,
    end,
    last,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Go on with the softmax over the tiles `begin` to `end` of N keys.

    MASKED compares positions, for tiles that not every line sees whole, and reads no key and no
    value behind `last`: what is there may be NaN, and 0 times NaN is not 0.
    """
    LOG2: tl.constexpr = 1.4426950408889634
    FACTOR: tl.constexpr = SCALE * LOG2 if CAP == 0 else 1.0
    lane = tl.arange(0, N)
    d = tl.arange(0, D_PAD)
    dv = tl.arange(0, DV_PAD)
    for tile in tl.range(begin, end):
        token = tile * N + lane
        k_at = keys + token[:, None] * key_n + d[None, :]
        v_at = values + token[:, None] * value_n + dv[None, :]
        if MASKED:
            k = tl.load(k_at, mask=(token <= last)[:, None] & (d < D)[None, :], other=0)
            v = tl.load(v_at, mask=(token <= last)[:, None] & (dv < DV)[None, :], other=0)
        else:
            k = tl.load(k_at) if D == D_PAD else tl.load(k_at, mask=(d < D)[None, :], other=0)
            v = tl.load(v_at) if DV == DV_PAD else tl.load(v_at, mask=(dv < DV)[None, :], other=0)
        if WIDE:
            k = k.to(tl.float32)
        s = tl.dot(query, tl.trans(k), input_precision="ieee")
        if CAP > 0:
            e = tl.exp2(tl.abs(s) * (-2.0 * LOG2 * SCALE / CAP))
            s = tl.where(s < 0, -CAP * LOG2, CAP * LOG2) * ((1.0 - e) / (1.0 + e))
        if MASKED:
            seen = token[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (token[None, :] > position[:, None] - WINDOW)
            s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(most, tl.max(s, 1) * FACTOR)
        p = tl.exp2(s * FACTOR - higher[:, None])
        fade = tl.exp2(most - higher)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        p = p.to(v.dtype)
        if WIDE:
            p, v = p.to(tl.float32), v.to(tl.float32)
        acc = tl.dot(p, v, acc, input_precision="ieee")
        most = higher
    return most, total, acc


@triton.jit(do_not_specialize=["rows", "splits"])
def split_kernel(
    query,
    keys,
    values,
    positions,
    sinks,
    out,
    partial,
    lse,
    query_b,
    query_h,
    query_r,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    rows,
    splits,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    LEAST: tl.constexpr,
    SINKS: tl.constexpr,
    DIRECT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Attention of M lines to one part of the keys.

    The parts divide the keys up to the row's last position, or those that the tile sees through
    its window. DIRECT is for a single part, which needs no join. WIDE multiplies in float32, for
    Triton's interpreter, which knows no product of bfloat16.
    """
    LOG2: tl.constexpr = 1.4426950408889634
    split = tl.program_id(2)
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    line = tl.program_id(0) * M + tl.arange(0, M)
    there = line < rows * G
    row, head = line // G, h * G + line % G
    position = tl.load(positions + b * rows + row, mask=there, other=-1).to(tl.int32)
    last = tl.max(position, 0)
    first = tl.min(tl.where(position < 0, last, position), 0)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first - WINDOW + 1, 0) // N
    end = (last + N) // N
    lse_at = lse + ((b * H + h) * splits + split) * rows * G + line
    if not DIRECT:
        span = end - begin
        if WINDOW == 0:  # parts of one size, whatever the tile sees of them
            furthest = -1
            for at in tl.range(0, rows, POSITIONS):
                many = at + tl.arange(0, POSITIONS)
                some = tl.load(positions + b * rows + many, mask=many < rows, other=-1)
                furthest = tl.maximum(furthest, tl.max(some.to(tl.int32), 0))
            span = (furthest + N) // N
        each = tl.maximum(tl.cdiv(span, splits), LEAST // N)
        begin += split * each
        end = tl.minimum(begin + each, end)
        if begin >= end:
            tl.store(lse_at, tl.full([M], float("-inf"), tl.float32), mask=there)
            return

    d = tl.arange(0, D_PAD)
    q_at = query + b * query_b + head[:, None] * query_h + row[:, None] * query_r + d[None, :]
    q = tl.load(q_at, mask=there[:, None] & (d < D)[None, :], other=0)
    if WIDE:
        q = q.to(tl.float32)
    keys += b * key_b + h * key_h
    values += b * value_b + h * value_h
    most = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV_PAD], tl.float32)
    whole = begin
    if WINDOW > 0:
        whole = tl.minimum(tl.cdiv(tl.maximum(last - WINDOW + 1, 0), N), end)
        whole = tl.maximum(whole, begin)
        most, total, acc = visit(
            q, position, most, total, acc, keys, values, key_n, value_n, begin, whole, last,
            SCALE, CAP, WINDOW, True, D, D_PAD, DV, DV_PAD, N, WIDE,
        )  # fmt: skip
    partly = tl.maximum(tl.minimum((first + 1) // N, end), whole)
    most, total, acc = visit(
        q, position, most, total, acc, keys, values, key_n, value_n, whole, partly, last,
        SCALE, CAP, WINDOW, False, D, D_PAD, DV, DV_PAD, N, WIDE,
    )  # fmt: skip
    most, total, acc = visit(
        q, position, most, total, acc, keys, values, key_n, value_n, partly, end, last,
        SCALE, CAP, WINDOW, True, D, D_PAD, DV, DV_PAD, N, WIDE,
    )  # fmt: skip

    if DIRECT and SINKS:
        sink = tl.load(sinks + head, mask=there, other=0).to(tl.float32) * LOG2
        higher = tl.maximum(most, sink)
        fade = tl.exp2(most - higher)
        total = total * fade + tl.exp2(sink - higher)
        acc = acc * fade[:, None]
        most = higher
    total = tl.where(position < 0, 0.0, total)
    acc = tl.where((total == 0)[:, None], 0.0, acc / total[:, None])
    dv = tl.arange(0, DV_PAD)
    mask = there[:, None] & (dv < DV)[None, :]
    if DIRECT:
        at = (b * rows + row) * (H * G) + head
        tl.store(out + at[:, None] * DV + dv[None, :], acc, mask=mask)
        tl.store(lse + at, (most + tl.log2(total)) / LOG2, mask=there)
    else:
        at = ((b * H + h) * splits + split) * rows * G + line
        tl.store(partial + at[:, None] * DV + dv[None, :], acc, mask=mask)
        tl.store(lse_at, most + tl.log2(total), mask=there)


@triton.jit(do_not_specialize=["rows", "splits"])
def join_kernel(
    partial,
    parts,
    sinks,
    out,
    lse,
    rows,
    splits,
    H: tl.constexpr,
    G: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    M: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    SINKS: tl.constexpr,
):
    """The output of M lines from their parts, and the log-sum-exp in units of 1."""
    LOG2: tl.constexpr = 1.4426950408889634
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    line = tl.program_id(0) * M + tl.arange(0, M)
    there = line < rows * G
    head = h * G + line % G
    begin = (b * H + h) * splits * rows * G + line
    split = tl.arange(0, SPLITS_PAD)
    logs_at = parts + begin[:, None] + split[None, :] * (rows * G)
    mask = there[:, None] & (split < splits)[None, :]
    logs = tl.load(logs_at, mask=mask, other=float("-inf"))
    most = tl.max(logs, 1)
    nothing = most == float("-inf")
    if SINKS:
        sink = tl.load(sinks + head, mask=there, other=0).to(tl.float32) * LOG2
        most = tl.maximum(most, sink)
    base = tl.where(nothing, 0.0, most)
    total = tl.sum(tl.exp2(logs - base[:, None]), 1)
    if SINKS:
        total = tl.where(nothing, 0.0, total + tl.exp2(sink - base))
    dv = tl.arange(0, DV_PAD)
    acc = tl.zeros([M, DV_PAD], tl.float32)
    for part in tl.range(0, splits):
        at = begin + part * (rows * G)
        log = tl.load(parts + at, mask=there, other=float("-inf"))
        # What an empty part would have written is not there to be read.
        held = (log > float("-inf"))[:, None] & (dv < DV)[None, :]
        one = tl.load(partial + at[:, None] * DV + dv[None, :], mask=held, other=0)
        acc += one * tl.exp2(log - base)[:, None]
    acc = tl.where((total == 0)[:, None], 0.0, acc / total[:, None])
    at = (b * rows + line // G) * (H * G) + head
    tl.store(out + at[:, None] * DV + dv[None, :], acc, mask=there[:, None] & (dv < DV)[None, :])
    tl.store(lse + at, (base + tl.log2(total)) / LOG2, mask=there)


class Processors(NamedTuple):
    """What a plan must know of a device.

    Args:
        number: streaming multiprocessors.
        shared: bytes of shared memory that a program may take.
    """

    number: int
    shared: int


def processors_of(tensor: Tensor) -> Processors:
    """Those of the device that holds the tensor; on a CPU one, like an H200's."""
    if not tensor.is_cuda:
        return Processors(1, 227 * 1024)
    return _processors(tensor.device.index)


@cache
def _processors(device: int) -> Processors:
    of = triton.runtime.driver.active.utils.get_device_properties(device)
    return Processors(of["multiprocessor_count"], of["max_shared_mem"])


class Plan(NamedTuple):
    """How rows and keys are laid over the device, from shapes alone.

    Args:
        lines: rows times heads of a group in a tile, a power of two of at least 16.
        keys: in a tile, a power of two of at least 16.
        splits: parts of the keys, at most.
        warps: a program.
        stages: tiles of keys on their way at once.
    """

    lines: int
    keys: int
    splits: int
    warps: int
    stages: int


def plan(
    kv_rows: int,
    lines: int,
    capacity: int,
    head_dim: int,
    value_dim: int,
    itemsize: int,
    processors: Processors,
) -> Plan:
    """The plan for a batch of tiles of lines over the places of an arena.

    Args:
        kv_rows: batch times KV heads.
        lines: rows times the query heads that share a KV head.
        capacity: places of a row of the arena.
        head_dim: numbers in a key.
        value_dim: numbers in a value.
        itemsize: bytes of each.
        processors: of the device.
    """
    widest = max(padded(head_dim), padded(value_dim))
    if itemsize == 4:  # without tensor cores, whose products of float32 are rounded
        most_lines, keys, warps, stages = 32, 16, 8, 1
    elif widest > 128:
        most_lines, keys, warps, stages = 64, 64, 8, 2
    elif capacity < LONG:
        most_lines, keys, warps, stages = 64, 64, 4, 3
    else:
        most_lines, keys, warps, stages = 128, 128, 8, 3
    tile = max(16, min(most_lines, triton.next_power_of_2(lines)))

    def fits() -> bool:
        kept = tile * padded(head_dim) + stages * keys * (padded(head_dim) + padded(value_dim))
        return kept * itemsize <= processors.shared

    if not fits():
        keys = min(keys, 64)
    while stages > 1 and not fits():
        stages -= 1
    if tile < most_lines:
        warps = 4
    programs = kv_rows * triton.cdiv(lines, tile)
    filling = round(WAVES * 8 / warps * processors.number / programs)
    even = min(capacity // MOST_KEYS, EVEN_WAVES * processors.number // programs)
    splits = min(max(filling, even), capacity // (LEAST_KEYS * tile), MOST_SPLITS)
    return Plan(tile, keys, max(1, splits), warps, stages)


def padded(dim: int) -> int:
    """The dimension of a tile that holds one of `dim` numbers."""
    return max(16, triton.next_power_of_2(dim))


def packed(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension in one piece."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def launch_scattered_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    chosen: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """`scattered_attention` by the kernels; None takes the plan of `plan`."""
    batch, heads, rows, head_dim = query.shape
    kv_heads, capacity, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    groups = heads // kv_heads
    if chosen is None:
        size = (capacity, head_dim, value_dim, keys.element_size())
        chosen = plan(batch * kv_heads, rows * groups, *size, processors_of(keys))
    query, keys, values = packed(query), packed(keys), packed(values)
    positions = positions.contiguous()
    out = values.new_empty(batch, rows, heads, value_dim)
    whole = torch.empty(batch, rows, heads, dtype=torch.float32, device=query.device)
    partial = parts = whole
    if chosen.splits > 1:
        shape = (batch, kv_heads, chosen.splits, rows, groups)
        parts = torch.empty(shape, dtype=torch.float32, device=query.device)
        partial = torch.empty(*shape, value_dim, dtype=torch.float32, device=query.device)
    sink = whole if sinks is None else sinks
    grid = (triton.cdiv(rows * groups, chosen.lines), batch * kv_heads, chosen.splits)
    split_kernel[grid](
        query,
        keys,
        values,
        positions,
        sink,
        out,
        partial,
        parts,
        query.stride(0),
        query.stride(1),
        query.stride(2),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        rows,
        chosen.splits,
        SCALE=scaling,
        CAP=softcap or 0.0,
        WINDOW=window or 0,
        H=kv_heads,
        G=groups,
        D=head_dim,
        D_PAD=padded(head_dim),
        DV=value_dim,
        DV_PAD=padded(value_dim),
        M=chosen.lines,
        N=chosen.keys,
        LEAST=max(LEAST_KEYS * chosen.lines, chosen.keys),
        SINKS=sinks is not None,
        DIRECT=chosen.splits == 1,
        WIDE=not keys.is_cuda,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    if chosen.splits > 1:
        lines = 8
        join_kernel[(triton.cdiv(rows * groups, lines), batch * kv_heads)](
            partial,
            parts,
            sink,
            out,
            whole,
            rows,
            chosen.splits,
            H=kv_heads,
            G=groups,
            DV=value_dim,
            DV_PAD=padded(value_dim),
            M=lines,
            SPLITS_PAD=triton.next_power_of_2(chosen.splits),
            SINKS=sinks is not None,
            num_warps=4,
        )
    return out.transpose(1, 2), whole.transpose(1, 2)
