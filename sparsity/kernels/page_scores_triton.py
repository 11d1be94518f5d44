# mypy: allow-untyped-defs
"""The kernels of `sparsity.kernels.page_scores`: a program for each KV head and block of pages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsity.kernels.operator import launcher, operator


@triton.jit
def page_bounds_kernel(
    query,
    kmin,
    kmax,
    bounds,
    query_b,
    query_h,
    low_b,
    low_h,
    low_p,
    high_b,
    high_h,
    high_p,
    pages,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bounds are read once and multiplied with the queries of the group, in float32."""
    row = tl.program_id(0).to(tl.int64)
    b = row // H
    h = row % H
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D_PAD)
    there = (p < pages)[:, None] & (d < D)[None, :]
    low_at = kmin + b * low_b + h * low_h + p[:, None] * low_p + d[None, :]
    high_at = kmax + b * high_b + h * high_h + p[:, None] * high_p + d[None, :]
    low = tl.load(low_at, mask=there, other=0).to(tl.float32)
    high = tl.load(high_at, mask=there, other=0).to(tl.float32)
    reduced = tl.full([BLOCK], float("-inf") if MAX else 0.0, tl.float32)
    for g in tl.static_range(G):
        q_at = query + b * query_b + (h * G + g) * query_h + d
        q = tl.load(q_at, mask=d < D, other=0).to(tl.float32)
        most = tl.maximum(q, 0.0)[None, :] * high + tl.minimum(q, 0.0)[None, :] * low
        bound = tl.sum(most, 1)
        reduced = tl.maximum(reduced, bound) if MAX else reduced + bound
    if not MAX:
        reduced = reduced / G
    tl.store(bounds + row * pages + p, reduced, mask=p < pages)


@triton.jit
def page_logits_kernel(
    query,
    keys,
    filled,
    logits,
    query_b,
    query_h,
    key_b,
    key_h,
    key_n,
    filled_b,
    filled_h,
    pages,
    H: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    S: tl.constexpr,
    S_PAD: tl.constexpr,
    MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A lane for each token of BLOCK pages, padded to a power of two a page.

    WIDE multiplies in float32, for Triton's interpreter, which knows no product of bfloat16.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // H
    h = row % H
    lane = tl.arange(0, BLOCK * S_PAD)
    p = tl.program_id(1) * BLOCK + lane // S_PAD
    inside = lane % S_PAD
    token = p * S + inside
    there = (p < pages) & (inside < S)
    d = tl.arange(0, D_PAD)
    g = tl.arange(0, G_PAD)
    q_at = query + b * query_b + (h * G + g)[:, None] * query_h + d[None, :]
    q = tl.load(q_at, mask=(g < G)[:, None] & (d < D)[None, :], other=0).to(keys.dtype.element_ty)
    k_at = keys + b * key_b + h * key_h + token[:, None] * key_n + d[None, :]
    k = tl.load(k_at, mask=there[:, None] & (d < D)[None, :], other=0)
    held = tl.load(filled + b * filled_b + h * filled_h + token, mask=there, other=0) != 0
    if WIDE:
        q, k = q.to(tl.float32), k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(held[None, :], scores, float("-inf"))
    highest = tl.max(tl.reshape(scores, [G_PAD, BLOCK, S_PAD]), 2)
    if MAX:
        reduced = tl.max(tl.where((g < G)[:, None], highest, float("-inf")), 0)
    else:
        reduced = tl.sum(tl.where((g < G)[:, None], highest, 0.0), 0) / G
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(logits + row * pages + at, reduced, mask=at < pages)


@operator("sparsity::page_bounds", mutates_args=())
def page_bounds_op(
    query: Tensor, kmin: Tensor, kmax: Tensor, group: str, block: int = 0, warps: int = 4
) -> Tensor:
    """`page_bounds` by the kernel; `block` pages a program, 0 to choose."""
    batch, heads, pages, head_dim = kmin.shape
    query, kmin, kmax = _rows(query), _rows(kmin), _rows(kmax)
    bounds = kmin.new_empty(batch, heads, pages, dtype=torch.float32)
    block = block or 16
    launcher(page_bounds_kernel)[(batch * heads, triton.cdiv(pages, block))](
        query,
        kmin,
        kmax,
        bounds,
        query.stride(0),
        query.stride(1),
        kmin.stride(0),
        kmin.stride(1),
        kmin.stride(2),
        kmax.stride(0),
        kmax.stride(1),
        kmax.stride(2),
        pages,
        H=heads,
        G=query.shape[1] // heads,
        D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim),
        MAX=group == "max",
        BLOCK=block,
        num_warps=warps,
    )
    return bounds


@operator("sparsity::page_logits", mutates_args=())
def page_logits_op(
    query: Tensor,
    keys: Tensor,
    filled: Tensor,
    page_size: int,
    group: str,
    block: int = 0,
    warps: int = 4,
) -> Tensor:
    """`page_logits` by the kernel; about `block` tokens a program, 0 to choose."""
    batch, heads, tokens, head_dim = keys.shape
    pages, groups = tokens // page_size, query.shape[1] // heads
    query, keys, filled = _rows(query), _rows(keys), _rows(filled)
    logits = keys.new_empty(batch, heads, pages, dtype=torch.float32)
    padded = triton.next_power_of_2(page_size)
    pages_each = max(16, block or 64, padded) // padded
    launcher(page_logits_kernel)[(batch * heads, triton.cdiv(pages, pages_each))](
        query,
        keys,
        filled,
        logits,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        filled.stride(0),
        filled.stride(1),
        pages,
        H=heads,
        G=groups,
        G_PAD=max(16, triton.next_power_of_2(groups)),
        D=head_dim,
        D_PAD=max(16, triton.next_power_of_2(head_dim)),
        S=page_size,
        S_PAD=padded,
        MAX=group == "max",
        BLOCK=pages_each,
        WIDE=not keys.is_cuda,
        num_warps=warps,
    )
    return logits


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension packed."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
