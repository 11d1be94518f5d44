"""Layers that lie side by side in one piece of memory, and are read and moved as one.

Every operation on a tensor lets other threads of Python go first, which takes longer than the
operation where several of them read chunks. So a few layers are one piece of memory for as long as
they are on their way, and tensors of their own where they arrive.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from picache.store.quantize import Encoded

AT_ONCE = 2**28
"""Bytes of the chunks of a prompt that are read or moved at once, where a layer is smaller."""
MOST_LAYERS = 8
"""Layers that are read or moved at once; what computes with the first waits for all of them."""


def layer_groups(num_layers: int, nbytes: int) -> list[range]:
    """The layers of a model in the groups in which those of chunks are read and moved.

    Args:
        num_layers: of the model.
        nbytes: of all chunks and layers.
    """
    each = max(1, min(MOST_LAYERS, AT_ONCE * num_layers // max(nbytes, 1)))
    return [range(first, min(first + each, num_layers)) for first in range(0, num_layers, each)]


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in a file or in memory, in bytes from its beginning, and what it is."""

    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.begin + self.nbytes


class Form(NamedTuple):
    """A tensor that is to stand in memory: of which layer, under which name, and what it is."""

    layer: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """Layers of a chunk in one piece of memory.

    Attributes:
        memory: uint8 ``[bytes]``.
        places: of each layer, where its tensors stand, each at a multiple of its elements' size.
    """

    memory: Tensor
    places: Sequence[Mapping[str, Place]]

    @classmethod
    def empty(cls, forms: Sequence[Form]) -> "Packed":
        """Memory of the host for tensors, page-locked where there is a CUDA device.

        Args:
            forms: of the tensors, in the order in which they come to stand without gaps; those of
                larger elements before those of smaller ones.
        """
        places: list[dict[str, Place]] = [{} for _ in range(1 + max(form.layer for form in forms))]
        begin = 0
        for form in forms:
            place = Place(begin, form.dtype, form.shape)
            places[form.layer][form.name] = place
            begin = place.end
        memory = torch.empty(begin, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        return cls(memory, places)

    def to(self, device: torch.device | str) -> "Packed":
        """The same on a device, by one copy that is queued if the memory is page-locked."""
        return Packed(self.memory.to(device, non_blocking=True), self.places)

    def layers(self) -> list[Encoded]:
        """The tensors, which are views of the memory."""
        whole: dict[torch.dtype, Tensor] = {}

        def tensor(place: Place) -> Tensor:
            if place.dtype not in whole:
                size = len(self.memory) // place.dtype.itemsize * place.dtype.itemsize
                whole[place.dtype] = self.memory[:size].view(place.dtype)
            strides = [math.prod(place.shape[i + 1 :]) for i in range(len(place.shape))]
            whole_begin = whole[place.dtype].storage_offset()  # which `as_strided` leaves out
            begin = whole_begin + place.begin // place.dtype.itemsize
            return whole[place.dtype].as_strided(place.shape, strides, begin)

        return [{name: tensor(place) for name, place in one.items()} for one in self.places]


def to_host(layers: Sequence[Encoded]) -> list[Encoded]:
    """Layers of a chunk in host memory, some side by side; those that are there as they are."""
    parts = _parts(layers)
    if all(part.device.type == "cpu" for part in parts):
        return list(layers)
    found: list[Encoded] = []
    for group in layer_groups(len(layers), sum(part.nbytes for part in parts)):
        found += _packed_on_host(layers[group.start : group.stop])
    for device in {part.device for part in parts if part.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return found


def _packed_on_host(layers: Sequence[Encoded]) -> list[Encoded]:
    """Copies side by side in host memory, once the devices have made them."""
    forms = [
        Form(index, name, part.dtype, tuple(part.shape))
        for index, layer in enumerate(layers)
        for name, part in layer.items()
    ]
    copies = Packed.empty(sorted(forms, key=lambda form: -form.dtype.itemsize)).layers()
    for layer, copy in zip(layers, copies, strict=True):
        for name, part in layer.items():
            copy[name].copy_(part, non_blocking=True)
    return copies


def moved(
    layers: Packed | Sequence[Encoded], device: torch.device | str | None
) -> Sequence[Encoded]:
    """Layers of a chunk on a device: by one copy where they lie side by side.

    From page-locked memory the copies are queued in the current CUDA stream, and the call does not
    wait for them. What is on the device already is not copied.

    Args:
        layers: packed or as tensors.
        device: None for the one they are on.
    """
    if isinstance(layers, Packed):
        return (layers if device is None else layers.to(device)).layers()
    if device is None or all(part.device == torch.device(device) for part in _parts(layers)):
        return layers
    found: list[Encoded] = []
    for _, some in groupby(layers, _storage):
        found += _moved(list(some), device)
    return found


def _parts(layers: Sequence[Encoded]) -> list[Tensor]:
    return [part for layer in layers for part in layer.values()]


def _storage(layer: Encoded) -> int:
    """Where the memory begins that the layer's first tensor lies in."""
    return next(iter(layer.values())).untyped_storage().data_ptr()


def _moved(layers: Sequence[Encoded], device: torch.device | str) -> list[Encoded]:
    """Layers on another device, by one copy where they fill a piece of memory."""
    packed = _packed(layers)
    if packed is not None:
        return packed.to(device).layers()
    return [
        {name: part.to(device, non_blocking=True) for name, part in layer.items()}
        for layer in layers
    ]


def _packed(layers: Sequence[Encoded]) -> Packed | None:
    """Layers as the piece of memory that they fill without a gap; None where they do not."""
    parts = _parts(layers)
    storages = {part.untyped_storage().data_ptr() for part in parts}
    if len(storages) > 1 or not all(part.is_contiguous() for part in parts):
        return None
    first = min(part.data_ptr() for part in parts)
    places = [
        {
            name: Place(part.data_ptr() - first, part.dtype, tuple(part.shape))
            for name, part in layer.items()
        }
        for layer in layers
    ]
    every = [place for layer in places for place in layer.values()]
    sizes, nbytes = [place.dtype.itemsize for place in every], sum(place.nbytes for place in every)
    storage = parts[0].untyped_storage()
    offset = first - storage.data_ptr()
    aligned = all(place.begin % size == 0 for place, size in zip(every, sizes, strict=True))
    if max(place.end for place in every) != nbytes or not aligned or offset % max(sizes):
        return None
    memory = torch.empty(0, dtype=torch.uint8, device=parts[0].device)
    memory.set_(storage, offset, (nbytes,), (1,))
    return Packed(memory, places)
