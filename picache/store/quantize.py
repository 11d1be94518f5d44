"""How one layer's keys and values are kept: as they are, in 8-bit integers or in 8-bit floats.

Slow and obvious on purpose: a few element-wise passes over a layer.
"""

import torch
from torch import Tensor

from picache.chunk import KV
from picache.errors import PICacheError

Encoded = dict[str, Tensor]  # parts of one layer by name; every storage has "keys" and "values"

FP8 = torch.float8_e4m3fn
KEPT_AS = {"int8": torch.int8, "fp8": FP8}
PARTS = {
    "exact": ("keys", "values"),
    "int8": ("keys", "keys_scale", "values", "values_scale"),
    "fp8": ("keys", "keys_scale", "values", "values_scale"),
}


def encode(kv: KV, storage: str) -> Encoded:
    """One layer as it is stored.

    "int8" is symmetric: one scale per (KV head, channel) for keys, whose outliers stay in few
    channels, and per (KV head, token) for values, as KIVI finds (arXiv 2402.02750, section 3.1;
    KIVI itself goes on to 2 bits, asymmetric, in groups). An element is off by at most half of its
    scale, which is the largest magnitude under it over 127.

    "fp8" is e4m3 with one scale per KV head, its largest magnitude on 448: an element is off by at
    most 1/16 of itself, or 2**-10 of the scale where that is more.

    Args:
        kv: keys and values, each ``[1, kv_heads, tokens, head_dim]``.
        storage: "exact", "int8" or "fp8".

    Raises:
        PICacheError: on another storage.
    """
    keys, values = kv
    if storage == "exact":
        return {"keys": keys, "values": values}
    if storage == "int8":
        parts = _to_int8(keys, over=2), _to_int8(values, over=3)
    elif storage == "fp8":
        parts = _to_fp8(keys), _to_fp8(values)
    else:
        raise PICacheError(f"storage must be one of {', '.join(PARTS)}, got {storage!r}")
    (keys, keys_scale), (values, values_scale) = parts
    return {
        "keys": keys,
        "keys_scale": keys_scale,
        "values": values,
        "values_scale": values_scale,
    }


def decode(parts: Encoded, dtype: torch.dtype) -> KV:
    """Keys and values of a layer again, in `dtype`; the inverse of `encode` up to its error."""
    keys, values = parts["keys"], parts["values"]
    if "keys_scale" in parts:
        keys = (keys.to(parts["keys_scale"].dtype) * parts["keys_scale"]).to(dtype)
        values = (values.to(parts["values_scale"].dtype) * parts["values_scale"]).to(dtype)
    return keys, values


def _scale(tensor: Tensor, over: int | tuple[int, ...], top: float) -> tuple[Tensor, Tensor]:
    """The tensor in float32 or wider, and what divides it into -top..top."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    largest = wide.abs().amax(over, keepdim=True)
    # A head of zeros, or of numbers too small to divide, keeps a scale that can be divided by.
    return wide, (largest / top).clamp_min(torch.finfo(wide.dtype).tiny)


def _to_int8(tensor: Tensor, over: int) -> tuple[Tensor, Tensor]:
    wide, scale = _scale(tensor, over, 127)
    return (wide / scale).round().clamp(-127, 127).to(torch.int8), scale


def _to_fp8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    wide, scale = _scale(tensor, (2, 3), torch.finfo(FP8).max)
    # At most top and a rounding error: that rounds to top, e4m3 turns NaN only from 464 on.
    return (wide / scale).to(FP8), scale
