"""Chunks' keys and values copied to their places in a prompt, and rotated on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from picache.errors import PICacheError
from picache.kernels.available import launch, require

ALIGNED = 16  # bytes: addresses are multiples, so that a thread reads and writes as many at once


class Piece(NamedTuple):
    """One chunk of a launch.

    Args:
        held: tokens of each head of its sources.
        skipped: how many of the first of them are left out.
        row: of the batch it goes to.
        place: in that row, of its first token that is not skipped.
        turn: row of the angles that belongs to that token; -1 for a chunk that is copied bit for
            bit, whose keys are neither rotated nor divided by the temperature.
    """

    held: int
    skipped: int
    row: int
    place: int
    turn: int


@dataclass(frozen=True)
class Turn:
    """How the tokens of a launch are rotated; layers that rotate otherwise need another launch.

    Args:
        cos: cosines, fp32 ``[tokens, pairs]``, one for each pair of dimensions.
        sin: sines, the same.
        pairing: "half" rotates dimension i with i + pairs, "interleaved" 2i with 2i + 1.
        offset: index of the first rotated dimension; those outside are copied.
        part: what is rotated: 0 the keys, 1 the values.
    """

    cos: Tensor
    sin: Tensor
    pairing: Literal["half", "interleaved"]
    offset: int = 0
    part: Literal[0, 1] = 0


def table_of(pieces: Sequence[Piece], turned: int, batch: int, capacity: int) -> Tensor:
    """The pieces as `place` takes them, int32 ``[chunks, 5]`` on the CPU.

    On the device nothing is checked, so it is here.

    Args:
        pieces: in any order.
        turned: rows of the angles; what `Piece.turn` counts where nothing is rotated too.
        batch: rows of the arena.
        capacity: places of each.

    Raises:
        PICacheError: for a piece that does not fit.
    """
    for piece in pieces:
        tokens = piece.held - piece.skipped
        if not (
            0 <= piece.skipped <= piece.held
            and 0 <= piece.row < batch
            and 0 <= piece.place <= capacity - tokens
            and -1 <= piece.turn <= max(-1, turned - tokens)
        ):
            raise PICacheError(
                f"{piece} does not fit an arena of {batch} rows of {capacity} places with angles "
                f"for {turned} tokens: give the arena more room, or place fewer tokens"
            )
    return torch.tensor(pieces, dtype=torch.int32).reshape(-1, 5)


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where tensors begin in memory, int64 ``[len(tensors)]`` on the CPU.

    The caller keeps the tensors for as long as the addresses are used.

    Raises:
        PICacheError: for a tensor that is not contiguous, or at an address that is no multiple of
            16 bytes.
    """
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNED:
            raise PICacheError(
                f"a tensor of shape {tuple(tensor.shape)} with strides {tensor.stride()} at an "
                f"address of {tensor.data_ptr() % ALIGNED} modulo {ALIGNED}: kernels take "
                f"contiguous tensors at multiples of {ALIGNED} bytes, clone() gives one"
            )
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)


def place(
    key_sources: Tensor,
    value_sources: Tensor,
    key_arenas: Tensor,
    value_arenas: Tensor,
    pieces: Tensor,
    keys: Tensor,
    values: Tensor,
    tokens: int,
    turn: Turn | None = None,
    temperature: float = 1.0,
) -> None:
    """Copy the keys and values of chunks to their places in several layers, on CUDA alone.

    Keys are divided by the temperature and rotated in fp32, and rounded once. What is at the
    addresses has the dtype of `keys`, and the launch depends on no number in these tables: a
    CUDA graph of it serves other chunks by writing others to the same tables.

    Args:
        key_sources: addresses on the device of each chunk's keys, contiguous
            ``[kv_heads, Piece.held, head_dim]``; int64 ``[layers, chunks]``, see `addresses`.
        value_sources: the same of the values, ``[kv_heads, Piece.held, value_dim]``.
        key_arenas: addresses of the layers' arenas of keys, int64 ``[layers]``.
        value_arenas: the same of the values.
        pieces: see `table_of`; int32 ``[chunks, 5]`` on the device. One with `held` 0 is left out.
        keys: the arena of keys of any of these layers, whose shape, strides and dtype all share:
            ``[batch, kv_heads, capacity, head_dim]``.
        values: the same of the values, ``[batch, kv_heads, capacity, value_dim]``.
        tokens: at least as many as all pieces have without the skipped; sizes the launch.
        turn: how chunks are rotated; None for layers without positions.
        temperature: by which keys are divided (APE).

    Raises:
        PICacheError: for tensors that the kernel cannot take.
    """
    if not keys.is_cuda:
        raise PICacheError(
            f"place on {keys.device}: addresses are those of a CUDA device; use place_reference"
        )
    require("place", (keys.dtype, values.dtype), keys.shape[-1], values.shape[-1])
    if turn is not None:
        refuse_turn(turn, (keys, values)[turn.part].shape[-1])
    from picache.kernels.place_triton import launch_place

    arenas = (key_sources, value_sources, key_arenas, value_arenas, pieces, keys, values)
    launch("place", keys, launch_place, *arenas, tokens, turn, temperature)


def refuse_turn(turn: Turn, dim: int) -> None:
    """Raise PICacheError for angles that `dim` numbers have no room for, or not in fp32."""
    pairs = turn.cos.shape[-1]
    if turn.cos.shape != turn.sin.shape or turn.offset + 2 * pairs > dim:
        raise PICacheError(
            f"place: cosines {tuple(turn.cos.shape)} and sines {tuple(turn.sin.shape)} from "
            f"dimension {turn.offset} on do not fit {dim} dimensions; give one of each a pair"
        )
    if turn.cos.dtype != torch.float32 or turn.sin.dtype != torch.float32:
        raise PICacheError(
            f"place: cosines are {turn.cos.dtype} and sines {turn.sin.dtype}; give both in float32"
        )


def place_reference(
    key_sources: Sequence[Sequence[Tensor]],
    value_sources: Sequence[Sequence[Tensor]],
    pieces: Sequence[Piece],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    turn: Turn | None = None,
    temperature: float = 1.0,
) -> None:
    """`place` in plain torch, on tensors.

    Args:
        key_sources: by layer and chunk, ``[kv_heads, Piece.held, head_dim]``.
        value_sources: the same of the values.
        pieces: one a chunk.
        keys: the arena of each layer, ``[batch, kv_heads, capacity, head_dim]``.
        values: the same of the values.
        turn: see `place`.
        temperature: see `place`.
    """
    for layer, sources in enumerate(zip(key_sources, value_sources, strict=True)):
        for part, arena in enumerate((keys[layer], values[layer])):
            cooled = temperature if part == 0 else 1.0
            turned = turn if turn is not None and turn.part == part else None
            for piece, source in zip(pieces, sources[part], strict=True):
                moved = source[:, piece.skipped :]
                if piece.turn >= 0:
                    moved = _moved(moved, turned, piece.turn, cooled)
                end = piece.place + piece.held - piece.skipped
                arena[piece.row, :, piece.place : end] = moved


def _moved(source: Tensor, turn: Turn | None, first: int, temperature: float) -> Tensor:
    """Rotated from row `first` of the angles on, and divided, in fp32; ``[heads, tokens, dim]``."""
    if turn is None and temperature == 1:
        return source
    moved = source.float() / temperature
    if turn is not None:
        cos, sin = (each[first : first + source.shape[1]] for each in (turn.cos, turn.sin))
        pairs = cos.shape[-1]
        whole = moved[..., turn.offset : turn.offset + 2 * pairs]
        if turn.pairing == "half":
            a, b = whole[..., :pairs], whole[..., pairs:]
        else:
            a, b = whole[..., ::2], whole[..., 1::2]
        new_a, new_b = a * cos - b * sin, b * cos + a * sin
        a.copy_(new_a)
        b.copy_(new_b)
    return moved.to(source.dtype)
