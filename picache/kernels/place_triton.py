# mypy: allow-untyped-defs
"""The kernel of `picache.kernels.place`: a program for a layer and a block of a chunk's tokens."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from picache.kernels.scattered_attention_triton import processors_of
from picache.kernels.tables import ALIGNED, Turn

LEAST_CHUNKS = 64  # that a program looks through: one kernel for all links of as many
TILE_BYTES = 8192  # of the keys of a head that a program holds at once
PROGRAMS = 8  # for each processor, so that enough reads are on their way


@triton.jit
def copy_head(source, target, target_n, live, W: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the rows of one head, bit for bit."""
    W_PAD: tl.constexpr = triton.next_power_of_2(W)
    t = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, W_PAD)[None, :]
    mask = live[:, None] & (d < W)
    x = tl.load(source + t * W + d, mask=mask)
    tl.store(target + t * target_n + d, x, mask=mask)


@triton.jit
def turn_head(
    source,
    target,
    target_n,
    live,
    cos,
    sin,
    temperature,
    W: tl.constexpr,
    PAIRS: tl.constexpr,
    OFFSET: tl.constexpr,
    HALVES: tl.constexpr,
    COOLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy the rows of one head and rotate PAIRS pairs of dimensions from OFFSET on."""
    PAIRS_PAD: tl.constexpr = triton.next_power_of_2(PAIRS)
    W_PAD: tl.constexpr = triton.next_power_of_2(W)
    t = tl.arange(0, BLOCK)[:, None]
    if HALVES:
        d = tl.arange(0, PAIRS_PAD)[None, :]
        mask = live[:, None] & (d < PAIRS)
        from_a = source + t * W + (OFFSET + d)
        a = tl.load(from_a, mask=mask, other=0).to(tl.float32)
        b = tl.load(from_a + PAIRS, mask=mask, other=0).to(tl.float32)
    else:
        d = tl.arange(0, 2 * PAIRS_PAD)[None, :]
        mask = live[:, None] & (d < 2 * PAIRS)
        both = tl.load(source + t * W + (OFFSET + d), mask=mask, other=0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [BLOCK, PAIRS_PAD, 2]))
    if COOLED:
        a, b = a / temperature, b / temperature
    new_a = a * cos - b * sin
    new_b = b * cos + a * sin
    to = target + t * target_n + (OFFSET + d)
    if HALVES:
        tl.store(to, new_a, mask=mask)
        tl.store(to + PAIRS, new_b, mask=mask)
    else:
        both = tl.reshape(tl.join(new_a, new_b), [BLOCK, 2 * PAIRS_PAD])
        tl.store(to, both, mask=mask)
    if 2 * PAIRS < W:  # dimensions without position
        d = tl.arange(0, W_PAD)[None, :]
        mask = live[:, None] & (d < W) & ((d < OFFSET) | (d >= OFFSET + 2 * PAIRS))
        x = tl.load(source + t * W + d, mask=mask)
        if COOLED:
            x = x.to(tl.float32) / temperature
        tl.store(target + t * target_n + d, x, mask=mask)


@triton.jit
def cool_head(source, target, target_n, live, temperature, W: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the rows of one head, divided by a temperature."""
    W_PAD: tl.constexpr = triton.next_power_of_2(W)
    t = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, W_PAD)[None, :]
    mask = live[:, None] & (d < W)
    x = tl.load(source + t * W + d, mask=mask).to(tl.float32) / temperature
    tl.store(target + t * target_n + d, x, mask=mask)


# Tables of single layers begin at any multiple of 8 bytes, which is no reason for another kernel.
@triton.jit(
    do_not_specialize=["chunks", "temperature"],
    do_not_specialize_on_alignment=[
        "key_sources",
        "value_sources",
        "key_arenas",
        "value_arenas",
        "pieces",
    ],
)
def place_kernel(
    like,
    key_sources,
    value_sources,
    key_arenas,
    value_arenas,
    pieces,
    cos,
    sin,
    chunks,
    temperature,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAIRS: tl.constexpr,
    OFFSET: tl.constexpr,
    HALVES: tl.constexpr,
    PART: tl.constexpr,
    COOLED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """BLOCK tokens of one chunk in one layer, and HEADS of its KV heads.

    A program finds its chunk by counting blocks, so that the launch depends on no length. Angles
    are read once for all of its heads. PAIRS is 0 where nothing is rotated.
    """
    TYPE: tl.constexpr = tl.pointer_type(like.dtype.element_ty)
    layer = tl.program_id(0)
    block = tl.program_id(1)
    c = tl.arange(0, CHUNKS_PAD)
    tokens = tl.load(pieces + c * 5, mask=c < chunks, other=0)
    tokens -= tl.load(pieces + c * 5 + 1, mask=c < chunks, other=0)
    ends = tl.cumsum(tl.cdiv(tokens, BLOCK), 0)
    passed = ends <= block
    chunk = tl.sum(passed.to(tl.int32), 0)
    if chunk >= chunks:
        return
    first = (block - tl.max(tl.where(passed, ends, 0), 0)) * BLOCK
    piece = pieces + chunk * 5
    held = tl.load(piece)
    skipped = tl.load(piece + 1)
    row = tl.load(piece + 2).to(tl.int64)
    place = tl.load(piece + 3)
    turn = tl.load(piece + 4)
    t = first + tl.arange(0, BLOCK)
    live = t < held - skipped

    which = layer * chunks + chunk
    key_from = tl.load(key_sources + which).to(TYPE)
    value_from = tl.load(value_sources + which).to(TYPE)
    key_to = tl.load(key_arenas + layer).to(TYPE)
    value_to = tl.load(value_arenas + layer).to(TYPE)
    key_from = tl.multiple_of(key_from, ALIGNED) + (skipped + first).to(tl.int64) * D
    value_from = tl.multiple_of(value_from, ALIGNED) + (skipped + first).to(tl.int64) * DV
    at = (place + first).to(tl.int64)
    key_to = tl.multiple_of(key_to, ALIGNED) + row * key_b + at * key_n
    value_to = tl.multiple_of(value_to, ALIGNED) + row * value_b + at * value_n
    key_step, value_step = held.to(tl.int64) * D, held.to(tl.int64) * DV
    heads = tl.program_id(2).to(tl.int64) * HEADS
    key_from += heads * key_step
    value_from += heads * value_step
    key_to += heads * key_h
    value_to += heads * value_h
    if turn < 0:
        for _ in tl.range(HEADS):
            copy_head(key_from, key_to, key_n, live, D, BLOCK)
            copy_head(value_from, value_to, value_n, live, DV, BLOCK)
            key_from += key_step
            value_from += value_step
            key_to += key_h
            value_to += value_h
    else:
        p = tl.arange(0, triton.next_power_of_2(max(PAIRS, 1)))[None, :]
        angle = (turn + t).to(tl.int64)[:, None] * PAIRS + p
        mask = live[:, None] & (p < PAIRS)
        cosine = tl.load(cos + angle, mask=mask, other=0)
        sine = tl.load(sin + angle, mask=mask, other=0)
        for _ in tl.range(HEADS):
            if PAIRS > 0 and PART == 0:
                turn_head(
                    key_from, key_to, key_n, live, cosine, sine, temperature,
                    D, PAIRS, OFFSET, HALVES, COOLED, BLOCK,
                )  # fmt: skip
            elif COOLED:
                cool_head(key_from, key_to, key_n, live, temperature, D, BLOCK)
            else:
                copy_head(key_from, key_to, key_n, live, D, BLOCK)
            if PAIRS > 0 and PART == 1:
                turn_head(
                    value_from, value_to, value_n, live, cosine, sine, temperature,
                    DV, PAIRS, OFFSET, HALVES, False, BLOCK,
                )  # fmt: skip
            else:
                copy_head(value_from, value_to, value_n, live, DV, BLOCK)
            key_from += key_step
            value_from += value_step
            key_to += key_h
            value_to += value_h


class Plan(NamedTuple):
    """How tokens and heads are laid over the device, from shapes alone.

    Args:
        block: tokens a program, a power of two.
        heads: KV heads a program, a divisor of all.
        warps: a program.
    """

    block: int
    heads: int
    warps: int


def plan(
    layers: int, tokens: int, kv_heads: int, widest: int, itemsize: int, processors: int
) -> Plan:
    """The plan for the tokens of all chunks in a number of layers.

    Args:
        layers: of the launch.
        tokens: of all chunks.
        kv_heads: of a layer.
        widest: numbers in a key or a value, whichever is more.
        itemsize: bytes of each.
        processors: of the device.
    """
    block = max(8, min(64, TILE_BYTES // (triton.next_power_of_2(widest) * itemsize)))
    programs = layers * triton.cdiv(tokens, block)
    heads = kv_heads
    while heads % 2 == 0 and programs * (kv_heads // heads) < PROGRAMS * processors:
        heads //= 2
    return Plan(block, heads, 4)


def launch_place(
    key_sources: Tensor,
    value_sources: Tensor,
    key_arenas: Tensor,
    value_arenas: Tensor,
    pieces: Tensor,
    keys: Tensor,
    values: Tensor,
    tokens: int,
    turn: Turn | None,
    temperature: float,
    chosen: Plan | None = None,
) -> None:
    """`place` by the kernel; None takes the plan of `plan`."""
    layers, chunks = key_sources.shape
    kv_heads, head_dim, value_dim = keys.shape[1], keys.shape[3], values.shape[3]
    if chosen is None:
        size = (kv_heads, max(head_dim, value_dim), keys.element_size())
        chosen = plan(layers, tokens, *size, processors_of(keys).number)
    cos = sin = keys  # nothing is read of a stand-in
    pairs, offset, halves, part = 0, 0, True, 0
    if turn is not None:
        cos, sin = turn.cos.contiguous(), turn.sin.contiguous()
        pairs, offset, part = cos.shape[-1], turn.offset, turn.part
        halves = turn.pairing == "half"
    blocks = tokens // chosen.block + chunks  # at most so many, however tokens are divided
    place_kernel[(layers, blocks, kv_heads // chosen.heads)](
        keys,
        key_sources,
        value_sources,
        key_arenas,
        value_arenas,
        pieces,
        cos,
        sin,
        chunks,
        temperature,
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        D=head_dim,
        DV=value_dim,
        PAIRS=pairs,
        OFFSET=offset,
        HALVES=halves,
        PART=part,
        COOLED=temperature != 1,
        HEADS=chosen.heads,
        BLOCK=chosen.block,
        CHUNKS_PAD=max(LEAST_CHUNKS, triton.next_power_of_2(chunks)),
        ALIGNED=ALIGNED,
        num_warps=chosen.warps,
    )
