"""Chunks' keys and values copied to their places in a prompt, and rotated on the way."""

from collections.abc import Sequence

from torch import Tensor

from picache.errors import PICacheError
from picache.kernels.available import launch, require
from picache.kernels.tables import Piece, Turn, refuse_tables, refuse_turn


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
            ``[kv_heads, Piece.held, head_dim]``; int64 ``[layers, chunks]``. See
            `tables.addresses`.
        value_sources: the same of the values, ``[kv_heads, Piece.held, value_dim]``.
        key_arenas: addresses of the layers' arenas of keys, int64 ``[layers]``.
        value_arenas: the same of the values.
        pieces: where each goes, as `tables.table_of` says it; int32 ``[chunks, 5]`` on the device.
            One with `held` 0 is left out.
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
    refuse_tables(key_sources, value_sources, key_arenas, value_arenas, pieces)
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        raise PICacheError(
            f"place: arenas with strides {keys.stride()} and {values.stride()}; the numbers of a "
            "key and of a value must follow one another"
        )
    if turn is not None:
        refuse_turn(turn, (keys, values)[turn.part].shape[-1])
    from picache.kernels.place_triton import launch_place

    arenas = (key_sources, value_sources, key_arenas, value_arenas, pieces, keys, values)
    launch("place", keys, launch_place, *arenas, tokens, turn, temperature)


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
