# mypy: allow-untyped-defs
"""The kernel of `sparsity.kernels.append`: one program for each row and KV head."""

import triton
import triton.language as tl
from torch import Tensor

from sparsity.kernels.operator import launcher, operator

MOST_PLACES = 2048  # compared at a time, where a page opens


@triton.jit
def append_kernel(
    keys,
    values,
    slots,
    start,
    stamp,
    sums,
    pinned,
    kmin,
    kmax,
    current,
    key,
    value,
    worth,
    rank,
    column,
    valid,
    key_b,
    key_h,
    value_b,
    value_h,
    worth_b,
    worth_h,
    places,
    H: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    S: tl.constexpr,
    S_PAD: tl.constexpr,
    SUMS: tl.constexpr,
    SUMS_PAD: tl.constexpr,
    BOUNDS: tl.constexpr,
    WORTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything is predicated: what a row does not need is neither read nor written."""
    NONE: tl.constexpr = 2147483647
    row = tl.program_id(0).to(tl.int64)
    b = row // H
    h = row % H
    d = tl.arange(0, D_PAD)
    dv = tl.arange(0, DV_PAD)
    new_key = tl.load(key + b * key_b + h * key_h + d, mask=d < D, other=0)
    new_value = tl.load(value + b * value_b + h * value_h + dv, mask=dv < DV, other=0)
    at = tl.load(rank + b)
    real = tl.load(valid + b) != 0
    slot = tl.load(column).to(tl.int32)
    page = tl.load(current + row)
    inside = at % S
    opens = real & (inside == 0)
    first = at.to(tl.int32)

    # The place for a new page: least worth, then oldest, then first.
    lane = tl.arange(0, BLOCK)
    best_worth = tl.full([BLOCK], float("inf"), tl.float32)
    best_start = tl.full([BLOCK], NONE, tl.int32)
    best_place = tl.full([BLOCK], NONE, tl.int32)
    for begin in range(0, tl.where(opens, places, 0), BLOCK):
        place = begin + lane
        there = place < places
        begun = tl.load(start + row * places + place, mask=there, other=NONE)
        if WORTH:
            here = tl.load(
                worth + b * worth_b + h * worth_h + place, mask=there, other=float("inf")
            ).to(tl.float32)
            here = tl.where(here == here, here, float("inf"))  # not a number
        else:
            here = tl.where(begun >= 0, 1.0, 0.0)
        better = there & ((here < best_worth) | ((here == best_worth) & (begun < best_start)))
        best_worth = tl.where(better, here, best_worth)
        best_start = tl.where(better, begun, best_start)
        best_place = tl.where(better, place, best_place)
    least = tl.min(best_worth, 0)
    oldest = tl.min(tl.where(best_worth == least, best_start, NONE), 0)
    tied = (best_worth == least) & (best_start == oldest)
    chosen = tl.min(tl.where(tied, best_place, NONE), 0)
    page = tl.where(opens, chosen.to(tl.int64), page)

    of_page = row * places + page
    tl.store(current + row, page, mask=opens)
    tl.store(start + of_page, first, mask=opens)
    tl.store(stamp + of_page, first, mask=opens)
    tl.store(pinned + of_page, False, mask=opens)
    if SUMS > 0:
        n = tl.arange(0, SUMS_PAD)
        zeros = tl.zeros([SUMS_PAD], tl.float32)
        tl.store(sums + of_page * SUMS + n, zeros, mask=n < tl.where(opens, SUMS, 0))

    token = of_page * S + inside
    written = d < tl.where(real, D, 0)
    tl.store(keys + token * D + d, new_key, mask=written)
    tl.store(values + token * DV + dv, new_value, mask=dv < tl.where(real, DV, 0))
    j = tl.arange(0, S_PAD)
    end = tl.where(real, tl.where(opens, S, inside + 1), 0)  # a new page is emptied
    emptied = tl.where(j == inside, slot, -1)
    tl.store(slots + of_page * S + j, emptied, mask=(j >= inside) & (j < end))
    if BOUNDS:
        bounds = of_page * D + d
        goes_on = d < tl.where(real & (inside != 0), D, 0)
        low = tl.load(kmin + bounds, mask=goes_on, other=0)
        high = tl.load(kmax + bounds, mask=goes_on, other=0)
        wide = new_key.to(tl.float32)
        low = tl.where(goes_on & (low.to(tl.float32) < wide), low, new_key)
        high = tl.where(goes_on & (high.to(tl.float32) > wide), high, new_key)
        tl.store(kmin + bounds, low, mask=written)
        tl.store(kmax + bounds, high, mask=written)


@operator(
    "sparsity::append",
    mutates_args=(
        "keys",
        "values",
        "slots",
        "start",
        "stamp",
        "sums",
        "pinned",
        "kmin",
        "kmax",
        "current",
    ),
)
def append_op(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    start: Tensor,
    stamp: Tensor,
    sums: Tensor,
    pinned: Tensor,
    kmin: Tensor | None,
    kmax: Tensor | None,
    current: Tensor,
    key: Tensor,
    value: Tensor,
    worth: Tensor | None,
    rank: Tensor,
    column: Tensor,
    valid: Tensor,
    page_size: int,
    warps: int = 4,
) -> None:
    """`append` by the kernel; see there for the arguments."""
    batch, heads, _, head_dim = keys.shape
    value_dim, places, sums_each = values.shape[-1], start.shape[-1], sums.shape[-1]
    key = key if key.stride(-1) == 1 else key.contiguous()
    value = value if value.stride(-1) == 1 else value.contiguous()
    if worth is not None and worth.stride(-1) != 1:
        worth = worth.contiguous()
    launcher(append_kernel)[(batch * heads,)](
        keys,
        values,
        slots,
        start,
        stamp,
        sums,
        pinned,
        rank if kmin is None else kmin,  # neither read nor written then, as below
        rank if kmax is None else kmax,
        current,
        key,
        value,
        rank if worth is None else worth,
        rank,
        column,
        valid,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        0 if worth is None else worth.stride(0),
        0 if worth is None else worth.stride(1),
        places,
        H=heads,
        D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim),
        DV=value_dim,
        DV_PAD=triton.next_power_of_2(value_dim),
        S=page_size,
        S_PAD=triton.next_power_of_2(page_size),
        SUMS=sums_each,
        SUMS_PAD=triton.next_power_of_2(max(1, sums_each)),
        BOUNDS=kmin is not None,
        WORTH=worth is not None,
        BLOCK=min(MOST_PLACES, triton.next_power_of_2(places)),
        num_warps=warps,
    )
