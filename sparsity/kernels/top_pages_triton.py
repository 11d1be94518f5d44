# mypy: allow-untyped-defs
"""The kernel of `sparsity.kernels.top_pages`: a program for each row and KV head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsity.kernels.operator import launcher, operator

MOST_PACKED = 4096  # places at once, for which registers suffice


@triton.jit
def in_order(score, there):
    """Scores as int32 of the same order, below any where there is no place.

    Not handed a pointer: torch's compiler would take it for one that is written through, since the
    result says where to write, and copy the scores.
    """
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 equals 0.0
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(there, ordered, -0x80000000)


@triton.jit
def top_pages_kernel(scores, chosen, places, count, P_PAD: tl.constexpr, PACKED: tl.constexpr):
    """The `count`-th highest score is found bit by bit, then what reaches it is packed.

    The search ends early where exactly `count` scores reach the number found so far: for unlike
    scores after about half of the bits. Of many places, PACKED are read again and packed at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    scores += row * places
    p = tl.arange(0, P_PAD)
    ordered = in_order(tl.load(scores + p, mask=p < places, other=0.0), p < places)
    least = tl.full([], -0x80000000, tl.int32)
    bit = tl.full([], 31, tl.int32)
    reached = places
    while (bit >= 0) & (reached != count):
        tried = least ^ (1 << bit)  # the sign first, from negative to not
        many = tl.sum((ordered >= tried).to(tl.int32), 0)
        least = tl.where(many >= count, tried, least)
        reached = tl.where(many >= count, many, reached)
        bit -= 1

    wanted = count - tl.sum((ordered > least).to(tl.int32), 0)  # of those equal to `least`
    seen = tl.full([], 0, tl.int32)
    for part in range(P_PAD // PACKED):
        at, some = p, ordered
        if PACKED < P_PAD:
            at = part * PACKED + tl.arange(0, PACKED)
            some = in_order(tl.load(scores + at, mask=at < places, other=0.0), at < places)
        above, equal = some > least, some == least
        flags = above.to(tl.int32) | (equal.to(tl.int32) << 16)  # both counts in one sum
        before = tl.cumsum(flags, 0) - flags + seen
        if PACKED < P_PAD:
            seen += tl.sum(flags, 0)
        equal_before = before >> 16
        to = (before & 0xFFFF) + tl.minimum(equal_before, wanted)
        taken = above | (equal & (equal_before < wanted))
        tl.store(chosen + row * count + to, at.to(tl.int64), mask=taken)


@operator("sparsity::top_pages", mutates_args=())
def top_pages_op(scores: Tensor, count: int, warps: int = 0) -> Tensor:
    """`top_pages` by the kernel, which lists places in ascending order; 0 `warps` to choose."""
    batch, heads, places = scores.shape
    chosen = scores.new_empty(batch, heads, count, dtype=torch.int64)
    padded = triton.next_power_of_2(places)
    if not warps:
        warps = 4 if padded <= 1024 else 8 if padded <= 4096 else 16
    launcher(top_pages_kernel)[(batch * heads,)](
        scores.contiguous(),
        chosen,
        places,
        count,
        P_PAD=padded,
        PACKED=min(padded, MOST_PACKED),
        num_warps=warps,
    )
    return chosen
