"""What is told to `place` of a link: addresses, where each chunk goes, and how it is rotated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from picache.errors import PICacheError

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


def refuse_tables(
    key_sources: Tensor,
    value_sources: Tensor,
    key_arenas: Tensor,
    value_arenas: Tensor,
    pieces: Tensor,
) -> None:
    """Raise PICacheError for tables of other shapes or types than `place` says."""
    layers, chunks = key_sources.shape
    for name, table, shape, dtype in (
        ("key_sources", key_sources, (layers, chunks), torch.int64),
        ("value_sources", value_sources, (layers, chunks), torch.int64),
        ("key_arenas", key_arenas, (layers,), torch.int64),
        ("value_arenas", value_arenas, (layers,), torch.int64),
        ("pieces", pieces, (chunks, 5), torch.int32),
    ):
        if table.shape != shape or table.dtype != dtype or not table.is_contiguous():
            raise PICacheError(
                f"place: {name} is {table.dtype} {tuple(table.shape)} with strides "
                f"{table.stride()}; it must be {dtype} {shape} and contiguous"
            )


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
