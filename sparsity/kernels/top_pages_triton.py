# mypy: allow-untyped-defs
"""The kernel of `sparsity.kernels.top_pages`: a program for each row and KV head."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


@triton.jit
def top_pages_kernel(scores, chosen, places, count, P_PAD: tl.constexpr):
    """The `count`-th highest score is found bit by bit, then what reaches it is packed.

    Scores are read once, as whole numbers of the same order. The search ends early where exactly
    `count` of them reach the number found so far: for unlike scores after about half of the bits.
    """
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, P_PAD)
    score = tl.load(scores + row * places + p, mask=p < places, other=0.0)
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 equals 0.0
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(p < places, ordered, -0x80000000)  # below -inf

    least = tl.full([], -0x80000000, tl.int32)
    bit = tl.full([], 31, tl.int32)
    reached = places
    while (bit >= 0) & (reached != count):
        tried = least ^ (1 << bit)  # the sign first, from negative to not
        many = tl.sum((ordered >= tried).to(tl.int32), 0)
        least = tl.where(many >= count, tried, least)
        reached = tl.where(many >= count, many, reached)
        bit -= 1

    above = ordered > least
    wanted = count - tl.sum(above.to(tl.int32), 0)  # of the places that equal the last one
    flags = above.to(tl.int32) | ((ordered == least).to(tl.int32) << 16)
    before = tl.cumsum(flags, 0) - flags
    equal_before = before >> 16
    at = (before & 0xFFFF) + tl.minimum(equal_before, wanted)
    taken = above | ((ordered == least) & (equal_before < wanted))
    tl.store(chosen + row * count + at, p.to(tl.int64), mask=taken)


@triton_op("sparsity::top_pages", mutates_args=())
def top_pages_op(scores: Tensor, count: int, warps: int = 0) -> Tensor:
    """`top_pages` by the kernel, which lists places in ascending order; 0 `warps` to choose."""
    batch, heads, places = scores.shape
    chosen = scores.new_empty(batch, heads, count, dtype=torch.int64)
    padded = triton.next_power_of_2(places)
    if not warps:
        warps = 4 if padded <= 1024 else 8 if padded <= 4096 else 16
    wrap_triton(top_pages_kernel)[(batch * heads,)](
        scores.contiguous(), chosen, places, count, P_PAD=padded, num_warps=warps
    )
    return chosen
