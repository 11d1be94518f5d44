# mypy: allow-untyped-defs
"""The kernel of `picache.kernels.attention_mass`: a program for each KV head and tile of keys."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from picache.kernels.scattered_attention_triton import POSITIONS, packed, padded


@triton.jit(do_not_specialize=["rows"])
def mass_kernel(
    query,
    keys,
    positions,
    lse,
    weight,
    mass,
    query_b,
    query_h,
    query_r,
    key_b,
    key_h,
    key_n,
    lse_b,
    lse_h,
    lse_r,
    weight_b,
    weight_h,
    rows,
    capacity,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The mass of N keys over the lines of one KV head, as a share of all rows and heads.

    WIDE multiplies in float32, for Triton's interpreter, which knows no product of bfloat16.
    """
    LOG2: tl.constexpr = 1.4426950408889634
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    token = tl.program_id(0) * N + tl.arange(0, N)
    mass_at = mass + (b * H + h) * capacity + token
    last, begin, end, counted = -1, rows, 0, 0
    for at in tl.range(0, rows, POSITIONS):
        row = at + tl.arange(0, POSITIONS)
        position = tl.load(positions + b * rows + row, mask=row < rows, other=-1).to(tl.int32)
        last = tl.maximum(last, tl.max(position, 0))
        begin = tl.minimum(begin, tl.min(tl.where(position >= 0, row, rows), 0))
        end = tl.maximum(end, tl.max(tl.where(position >= 0, row + 1, 0), 0))
        counted += tl.sum((position >= 0).to(tl.int32), 0)
    acc = tl.zeros([N], tl.float32)
    if tl.program_id(0) * N > last:
        tl.store(mass_at, acc, mask=token < capacity)
        return

    d = tl.arange(0, D_PAD)
    k_at = keys + b * key_b + h * key_h + token[:, None] * key_n + d[None, :]
    k = tl.load(k_at, mask=(token <= last)[:, None] & (d < D)[None, :], other=0)
    if WIDE:
        k = k.to(tl.float32)
    for at in tl.range(begin * G, end * G, M):
        line = at + tl.arange(0, M)
        there = line < end * G
        row, head = line // G, h * G + line % G
        position = tl.load(positions + b * rows + row, mask=there, other=-1).to(tl.int32)
        q_at = query + b * query_b + head[:, None] * query_h + row[:, None] * query_r + d[None, :]
        q = tl.load(q_at, mask=there[:, None] & (d < D)[None, :], other=0)
        lse_at = lse + b * lse_b + head * lse_h + row * lse_r
        whole = tl.load(lse_at, mask=there, other=0) * LOG2
        if WIDE:
            q = q.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * LOG2)
        if CAP > 0:
            e = tl.exp2(tl.abs(s) * (-2.0 / CAP))
            s = tl.where(s < 0, -CAP * LOG2, CAP * LOG2) * ((1.0 - e) / (1.0 + e))
        seen = token[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (token[None, :] > position[:, None] - WINDOW)
        p = tl.where(seen, tl.exp2(s - whole[:, None]), 0.0)
        acc += tl.sum(p, 0)
    acc = acc / (counted * (H * G)).to(tl.float32)
    if WEIGHTED:
        weight_at = weight + b * weight_b + h * weight_h + token
        acc = acc * tl.load(weight_at, mask=token <= last, other=0).to(tl.float32)
    tl.store(mass_at, acc, mask=token < capacity)


class Plan(NamedTuple):
    """Sizes of a tile, from shapes alone; see `scattered_attention_triton.Plan`."""

    lines: int
    keys: int
    warps: int
    stages: int


def plan(lines: int, head_dim: int, itemsize: int) -> Plan:
    """The plan for a number of lines, which are rows times the heads of a group."""
    most_lines, keys, stages = 64, 128 if padded(head_dim) <= 128 else 64, 2
    if itemsize == 4:
        most_lines, keys, stages = 32, 16, 1
    tile = max(16, min(most_lines, triton.next_power_of_2(lines)))
    return Plan(tile, keys, 8 if tile == most_lines else 4, stages)


def launch_attention_mass(
    query: Tensor,
    keys: Tensor,
    positions: Tensor,
    lse: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    weight: Tensor | None,
    chosen: Plan | None = None,
) -> Tensor:
    """`attention_mass` by the kernel; None takes the plan of `plan`."""
    batch, heads, rows, head_dim = query.shape
    kv_heads, capacity = keys.shape[1:3]
    groups = heads // kv_heads
    chosen = chosen or plan(rows * groups, head_dim, keys.element_size())
    query, keys, positions = packed(query), packed(keys), positions.contiguous()
    by_head = torch.empty(batch, kv_heads, capacity, dtype=torch.float32, device=keys.device)
    factor = by_head if weight is None else packed(weight)
    mass_kernel[(triton.cdiv(capacity, chosen.keys), batch * kv_heads)](
        query,
        keys,
        positions,
        lse,
        factor,
        by_head,
        query.stride(0),
        query.stride(1),
        query.stride(2),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        lse.stride(0),
        lse.stride(1),
        lse.stride(2),
        factor.stride(0),
        factor.stride(1),
        rows,
        capacity,
        SCALE=scaling,
        CAP=softcap or 0.0,
        WINDOW=window or 0,
        H=kv_heads,
        G=groups,
        D=head_dim,
        D_PAD=padded(head_dim),
        M=chosen.lines,
        N=chosen.keys,
        WEIGHTED=weight is not None,
        WIDE=not keys.is_cuda,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    return by_head.sum(1)  # no atomic additions, whose order and rounding would change by run
