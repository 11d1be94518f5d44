"""Tensors that lie side by side in one piece of memory, and are read and moved as one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from picache.kernels.tables import ALIGNED
from picache.store.quantize import Encoded

AT_ONCE = 2**24
"""Bytes of a chunk that are read or moved at once, where a layer is smaller."""
MOST_LAYERS = 8
"""Layers that are read or moved at once; what computes with the first waits for all of them."""

Form = tuple[Sequence[int], torch.dtype]
"""Shape and dtype of a tensor."""


def side_by_side(forms: Sequence[Form]) -> tuple[Tensor, list[Tensor]]:
    """Memory of the host for tensors in a row, page-locked where there is a CUDA device.

    Args:
        forms: of the tensors, of larger elements before those of smaller ones, so that each is
            aligned to its elements.

    Returns:
        The memory, uint8 ``[bytes]``, and the tensors, which are views of it.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in forms]
    memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    pieces = memory.split(sizes)
    return memory, [
        piece.view(dtype).view(shape) for piece, (shape, dtype) in zip(pieces, forms, strict=True)
    ]


def groups(num_layers: int, nbytes: int) -> list[range]:
    """The layers of a model in the groups in which a chunk's are read and moved.

    Args:
        num_layers: of the model.
        nbytes: of the chunk, all layers.
    """
    each = max(1, min(MOST_LAYERS, AT_ONCE * num_layers // max(nbytes, 1)))
    return [range(first, min(first + each, num_layers)) for first in range(0, num_layers, each)]


def to_host(layers: Sequence[Encoded]) -> list[Encoded]:
    """Layers of a chunk in one piece of host memory; those that are on the host as they are."""
    named = [(index, name) for index, layer in enumerate(layers) for name in layer]
    named.sort(key=lambda one: -layers[one[0]][one[1]].itemsize)
    held = [layers[index][name] for index, name in named]
    if all(part.device.type == "cpu" for part in held):
        return list(layers)
    _, copies = side_by_side([(part.shape, part.dtype) for part in held])
    found: list[Encoded] = [{} for _ in layers]
    for (index, name), part, copy in zip(named, held, copies, strict=True):
        found[index][name] = copy.copy_(part, non_blocking=True)
    for device in {part.device for part in held if part.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return found


def moved(layers: Sequence[Encoded], device: torch.device | str) -> list[Encoded]:
    """Layers of a chunk on a device: by one copy where they lie side by side.

    From page-locked memory the copies are queued in the current CUDA stream, and the call does not
    wait for them. What is on the device already is not copied.
    """
    parts = [part for layer in layers for part in layer.values()]
    span = _span(parts)
    if span is None:
        there = [part.to(device, non_blocking=True) for part in parts]
    else:
        copy = span.to(device, non_blocking=True)
        first = span.data_ptr()
        there = []
        for part in parts:
            begin = part.data_ptr() - first
            there.append(copy[begin : begin + part.nbytes].view(part.dtype).view(part.shape))
    in_order = iter(there)
    return [{name: next(in_order) for name in layer} for layer in layers]


def _span(parts: Sequence[Tensor]) -> Tensor | None:
    """The bytes that these tensors fill without a gap, uint8; None where they do not.

    Nor where a tensor would come to stand at an address that kernels do not take.
    """
    storages = {part.untyped_storage().data_ptr() for part in parts}
    if len(parts) < 2 or len(storages) > 1 or not all(part.is_contiguous() for part in parts):
        return None
    begins = [part.data_ptr() for part in parts]
    first, nbytes = min(begins), sum(part.nbytes for part in parts)
    ends = (begin + part.nbytes for begin, part in zip(begins, parts, strict=True))
    if max(ends) - first != nbytes or any((begin - first) % ALIGNED for begin in begins):
        return None
    storage = parts[0].untyped_storage()
    whole = torch.empty(0, dtype=torch.uint8, device=parts[0].device)
    return whole.set_(storage, first - storage.data_ptr(), (nbytes,), (1,))
