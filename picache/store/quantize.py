"""Three ways to store a layer's keys and values: exactly, in 8-bit integers or in 8-bit floats."""

import torch
from torch import Tensor

from picache.chunk import KV
from picache.errors import PICacheError

Encoded = dict[str, Tensor]
"""The tensors that one layer is stored as, by name; every storage has "keys" and "values"."""

FP8 = torch.float8_e4m3fn
KEPT_AS = {"int8": torch.int8, "fp8": FP8}
PARTS = {
    "exact": ("keys", "values"),
    "int8": ("keys", "keys_scale", "values", "values_scale"),
    "fp8": ("keys", "keys_scale", "values", "values_scale"),
}


def encode(kv: KV, storage: str) -> Encoded:
    """Encode the keys and values of one layer as they are stored.

    "int8" is symmetric quantisation. Keys have one scale for each KV head and channel, since their
    outliers stay in few channels; values have one for each KV head and token, as KIVI finds (arXiv
    2402.02750, section 3.1; KIVI itself goes on to 2 bits, asymmetric, in groups). A scale is the
    largest magnitude that it covers, divided by 127; an element is off by at most half of it.

    "fp8" is the 8-bit float e4m3 with one scale per KV head, which maps the largest magnitude to
    448. An element is off by at most 1/16 of itself, or by 2**-10 of the scale where that is more.

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
    """Decode keys and values of one layer to `dtype`; the inverse of `encode` up to its error."""
    keys, values = parts["keys"], parts["values"]
    if "keys_scale" in parts:
        keys = (keys.to(parts["keys_scale"].dtype) * parts["keys_scale"]).to(dtype)
        values = (values.to(parts["values_scale"].dtype) * parts["values_scale"]).to(dtype)
    return keys, values


def _scale(tensor: Tensor, over: int | tuple[int, ...], top: float) -> tuple[Tensor, Tensor]:
    """The tensor in float32 or wider, and the scale that divides it into ``-top..top``.

    Args:
        tensor: ``[1, kv_heads, tokens, head_dim]``.
        over: the dimensions that share a scale.
        top: the largest magnitude the stored type shall take.
    """
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    largest = wide.abs().amax(over, keepdim=True)
    # Zeros, or numbers too small to divide by, get the smallest scale that is not zero.
    return wide, (largest / top).clamp_min(torch.finfo(wide.dtype).tiny)


def _to_int8(tensor: Tensor, over: int) -> tuple[Tensor, Tensor]:
    wide, scale = _scale(tensor, over, 127)
    return (wide / scale).round().clamp(-127, 127).to(torch.int8), scale


def _to_fp8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    wide, scale = _scale(tensor, (2, 3), torch.finfo(FP8).max)
    # A rounding error may exceed top, and rounds back to it: e4m3 turns to NaN from 464 on only.
    return (wide / scale).to(FP8), scale
