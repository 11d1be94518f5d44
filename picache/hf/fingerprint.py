"""A hash of a model's weights and configuration, to tell one model's chunks from another's."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from picache.hf.tensor_parallel import local

PLAIN = (nn.Parameter, Tensor)
"""Types of tensors that are no subclass that wraps others, as quantised weights are."""

_WIDTH = 4099  # a prime: rows of a weight that are exchanged fall into other columns
# Fields of the configuration that say nothing of the keys and values.
_VOLATILE = ("_name_or_path", "transformers_version", "_attn_implementation")


def settings(config: Any) -> dict[str, Any]:
    """The fields of a transformers configuration that keys and values may depend on; a copy."""
    return {name: value for name, value in config.to_dict().items() if name not in _VOLATILE}


def plain(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The plain tensors, by name, of a parameter: itself, or the parts of a tensor subclass.

    Quantised weights are often a tensor subclass, made of integers and scales. Of a weight that is
    shared out it is what this process holds.
    """
    tensor = local(tensor)
    if type(tensor) in PLAIN or not is_traceable_wrapper_subclass(tensor):
        return [(name, tensor)]
    inner = tensor.__tensor_flatten__()[0]
    return [one for part in inner for one in plain(f"{name}.{part}", getattr(tensor, part))]


@torch.no_grad()
def fingerprint(kept: dict[str, Any], tensors: list[tuple[str, Tensor]]) -> str:
    """SHA-256 over settings and, for every tensor, the sums of its bits in two directions.

    The bits of a tensor are written into a matrix whose width is a prime. The sums of its rows and
    of its columns change when a value changes, and when values are exchanged with each other (as
    when two vocabulary entries, heads or experts are swapped). It takes two passes over the memory.
    It tells different weights apart; it does not protect against weights made to collide.
    """
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in tensors:
        bits = tensor.detach().contiguous().flatten().view(torch.uint8)
        bits = bits.view(torch.int16) if bits.numel() % 2 == 0 else bits
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        whole = bits[: len(bits) // _WIDTH * _WIDTH].view(-1, _WIDTH)
        rest = bits[len(whole) * _WIDTH :]
        for sums in (whole.sum(1, dtype=torch.int64), whole.sum(0, dtype=torch.int64), rest):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def middles(tensors: list[Tensor]) -> list[float]:
    """An element in the middle of each tensor, fetched in one transfer per dtype and device."""
    alike: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        if count := tensor.numel():
            if tensor.is_contiguous():
                into = count // 2
            else:
                steps = zip(tensor.shape, tensor.stride(), strict=True)
                into = sum(n // 2 * step for n, step in steps)
            # Twice as fast as an index for each dimension.
            middle = tensor.as_strided((), (), tensor.storage_offset() + into)
            alike.setdefault((tensor.dtype, tensor.device), []).append(middle)
    return [value for some in alike.values() for value in torch.stack(some).tolist()]
