"""Random numbers without a state: a hash of what they are for."""

from typing import TypeVar

import torch
from torch import Tensor

from sparsity.policies.base import PageView

_LOW32 = 0xFFFFFFFF
_Bits = TypeVar("_Bits", int, Tensor)


def uniform(seed: int, pages: PageView) -> Tensor:
    """A random number for each page, one of 2**24 values in [0, 1).

    It is a hash of (seed, layer, KV head, rank of the page, rank of the newest token): neither the
    other rows of a batch nor padding change it, a reset brings the same numbers again, and the rows
    of one batch share them.

    Args:
        seed: changes all numbers.
        pages: what one layer holds.

    Returns:
        float32 `[batch, kv_heads, P]`.
    """
    heads = torch.arange(pages.start.shape[1], device=pages.start.device) + pages.first_head
    draw = mix(_signed(mix(seed * 0x9E3779B1 + pages.layer)) + heads[None, :, None])
    draw = mix(draw ^ (pages.start.long() & _LOW32))
    draw = mix(draw ^ (pages.now.long() & _LOW32))
    return (draw >> 8).float() / 2**24


def _signed(bits: int) -> int:
    """The same 32 bits as a signed number: what a compiled step adds to an index has to be one."""
    return bits - (bits >> 31 << 32)


def mix(value: _Bits) -> _Bits:
    """MurmurHash3's 32-bit finaliser: every input bit changes every output bit (int64 may wrap)."""
    value = value & _LOW32
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _LOW32
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _LOW32
    return value ^ (value >> 16)
