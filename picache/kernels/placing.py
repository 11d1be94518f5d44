"""Chunks put into the memory of a prompt in all layers at once, and rotated on the way."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from picache.chunk import KV
from picache.kernels.available import DTYPES
from picache.kernels.place import place, place_reference
from picache.kernels.tables import ALIGNED, Piece, Turn, addresses, table_of


@dataclass(frozen=True)
class LayerKV:
    """One layer of a prompt that is put together.

    Attributes:
        parts: KV of each chunk as compiled, ``[1, kv_heads, tokens, head_dim]``.
        memory: of the prompt, ``[1, kv_heads, tokens, head_dim]``; may be a part of an arena.
        turn: how the chunks are rotated; None for a layer without positions.
    """

    parts: Sequence[KV]
    memory: KV
    turn: Turn | None

    @property
    def kind(self) -> Hashable:
        """Layers of one kind are put together in one launch."""
        shapes = [(t.shape[1], t.stride(), t.shape[-1], t.dtype, t.device) for t in self.memory]
        return (id(self.turn), *shapes)


def can_place(memory: Sequence[KV]) -> bool:
    """Whether `place_layers` takes this memory of a prompt: its type, and where it begins."""
    return all(
        tensor.dtype in DTYPES and tensor.data_ptr() % ALIGNED == 0 and tensor.stride(-1) == 1
        for layer in memory
        for tensor in layer
    )


def place_layers(layers: Sequence[LayerKV], pieces: Sequence[Piece]) -> None:
    """Copy chunks to their places in every layer, and rotate them.

    Args:
        layers: of the prompt, in any order.
        pieces: where each chunk goes.
    """
    kinds: dict[Hashable, list[LayerKV]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    for alike in kinds.values():
        _place(alike, pieces)


def _place(layers: Sequence[LayerKV], pieces: Sequence[Piece]) -> None:
    """`place_layers` of layers of one kind."""
    keys, values = layers[0].memory
    turn = layers[0].turn
    key_sources, value_sources = (
        [[part[which][0].contiguous() for part in layer.parts] for layer in layers]
        for which in (0, 1)
    )
    if not keys.is_cuda:
        memory = [layer.memory[0] for layer in layers], [layer.memory[1] for layer in layers]
        place_reference(key_sources, value_sources, pieces, *memory, turn)
        return
    # All that the launch reads of the host goes to the device in one copy.
    told = [
        addresses([t for layer in part for t in layer]) for part in (key_sources, value_sources)
    ]
    told += [torch.tensor([layer.memory[which].data_ptr() for layer in layers]) for which in (0, 1)]
    on_device = torch.cat(told).to(keys.device).split([len(each) for each in told])
    from_keys, from_values = (each.view(len(layers), -1) for each in on_device[:2])
    table = table_of(pieces, 0 if turn is None else len(turn.cos), 1, keys.shape[2])
    tokens = sum(piece.held - piece.skipped for piece in pieces)
    to_keys, to_values = on_device[2:]
    where = (from_keys, from_values, to_keys, to_values, table.to(keys.device))
    place(*where, keys, values, tokens, turn)
