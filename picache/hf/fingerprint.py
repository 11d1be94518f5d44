"""What tells a model's weights and configuration from another's."""

import copy
import hashlib
import json
from typing import Any

import torch
from torch import Tensor

_ROW = 4099
_VOLATILE = ("_name_or_path", "transformers_version", "_attn_implementation")


@torch.no_grad()
def fingerprint(config: dict[str, Any], tensors: list[tuple[str, Tensor]]) -> str:
    """SHA-256 over a configuration and, for every tensor, sums over its bits in two directions.

    A tensor's bits are laid out in rows of a prime length; the sums of the rows and of the columns
    change when values do and when they trade places (rows, heads, experts). Two passes at the
    memory's speed; they find other weights, not a forgery.
    """
    kept = {k: v for k, v in copy.deepcopy(config).items() if k not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in tensors:
        bits = tensor.detach().contiguous().flatten().view(torch.uint8)
        bits = bits.view(torch.int16) if bits.numel() % 2 == 0 else bits
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        whole = bits[: len(bits) // _ROW * _ROW].view(-1, _ROW)
        rest = bits[len(whole) * _ROW :]
        for sums in (whole.sum(1, dtype=torch.int64), whole.sum(0, dtype=torch.int64), rest):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def middles(tensors: list[Tensor]) -> list[float]:
    """The element in the middle of each tensor; those of a kind and place in one transfer."""
    alike: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            middle = tensor.detach()[tuple(n // 2 for n in tensor.shape)]
            alike.setdefault((tensor.dtype, tensor.device), []).append(middle)
    return [value for some in alike.values() for value in torch.stack(some).tolist()]
