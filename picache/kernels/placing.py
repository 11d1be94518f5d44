"""Chunks put into the memory of a prompt in all layers at once, and rotated on the way."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from picache.chunk import KV
from picache.kernels.available import DTYPES
from picache.kernels.place import place, place_reference
from picache.kernels.queued import queued
from picache.kernels.tables import ALIGNED, Piece, Turn, addresses, table_of


@dataclass(frozen=True)
class Resident:
    """A chunk on a device, and where in its memory each layer begins.

    Attributes:
        layers: its keys and values, contiguous ``[1, kv_heads, tokens, head_dim]``, layer by layer.
        begins: addresses of the keys and of the values, int64 ``[layers, 2]`` on the CPU.
        nbytes: bytes of all layers.
    """

    layers: Sequence[KV]
    begins: Tensor
    nbytes: int

    @classmethod
    def of(cls, layers: Iterable[KV]) -> "Resident":
        """A chunk of these layers; a copy of those that kernels do not take as they lie."""
        layers = [(_settled(keys), _settled(values)) for keys, values in layers]
        tensors = [tensor for layer in layers for tensor in layer]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        return cls(layers, addresses(tensors).view(-1, 2), nbytes)


def _settled(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that is contiguous and begins where a kernel may begin to read."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNED == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class LayerKV:
    """One layer of the memory in which prompts are put together.

    Attributes:
        memory: ``[batch, kv_heads, tokens, head_dim]``; may be a part of an arena.
        turn: how the chunks are rotated; None for a layer without positions.
    """

    memory: KV
    turn: Turn | None

    @property
    def kind(self) -> Hashable:
        """Layers of one kind are put together in one launch."""
        shapes = [(t.shape, t.stride(), t.dtype, t.device) for t in self.memory]
        return (id(self.turn), *shapes)


def can_place(memory: Sequence[KV]) -> bool:
    """Whether `place_layers` takes this memory of a prompt: its type, and where it begins."""
    return all(
        tensor.dtype in DTYPES and tensor.data_ptr() % ALIGNED == 0 and tensor.stride(-1) == 1
        for layer in memory
        for tensor in layer
    )


def place_layers(
    layers: Sequence[LayerKV], parts: Sequence[Resident], pieces: Sequence[Piece]
) -> None:
    """Copy chunks to their places in every layer, and rotate them.

    Args:
        layers: of the prompts, in any order.
        parts: the chunks, which hold these layers in the same order.
        pieces: where each chunk goes.
    """
    kinds: dict[Hashable, list[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault(layer.kind, []).append(index)
    for alike in kinds.values():
        _place(layers, alike, parts, pieces)


def _place(
    layers: Sequence[LayerKV],
    alike: list[int],
    parts: Sequence[Resident],
    pieces: Sequence[Piece],
) -> None:
    """`place_layers` of some of the layers, which are of one kind."""
    memory = [layers[index].memory for index in alike]
    (keys, values), turn = memory[0], layers[alike[0]].turn
    if turn is None:  # without positions every chunk is copied bit for bit
        pieces = [piece._replace(turn=-1) for piece in pieces]
    table = table_of(pieces, 0 if turn is None else len(turn.cos), len(keys), keys.shape[2])
    if not keys.is_cuda:
        held = [
            [[part.layers[index][which][0] for part in parts] for index in alike]
            for which in (0, 1)
        ]
        into = [keys for keys, _ in memory], [values for _, values in memory]
        place_reference(held[0], held[1], pieces, *into, turn)
        return
    begins = torch.stack([part.begins for part in parts])
    if len(alike) < len(layers):
        begins = begins[:, alike]
    sources = begins.permute(2, 1, 0).flatten()
    arenas = torch.tensor(
        [tensor.data_ptr() for one in zip(*memory, strict=True) for tensor in one]
    )
    numbers = table.flatten()
    even = torch.nn.functional.pad(numbers, (0, len(numbers) % 2)).view(torch.int64)
    # All that the launch reads of the host goes to the device in one copy, which waits for nothing.
    told = queued(torch.cat([sources, arenas, even]), keys.device)
    sources, arenas, even = told.split([len(sources), len(arenas), len(even)])
    key_sources, value_sources = sources.view(2, len(alike), len(parts))
    key_arenas, value_arenas = arenas.view(2, len(alike))
    table = even.view(torch.int32)[: len(numbers)].view(table.shape)
    tokens = sum(piece.held - piece.skipped for piece in pieces)
    where = (key_sources, value_sources, key_arenas, value_arenas, table)
    place(*where, keys, values, tokens, turn)
