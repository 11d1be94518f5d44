"""Whether the kernels of a link give on a device what their twins give, tried on a few tokens."""

import torch
from torch import Tensor

from picache.chunk import KV
from picache.kernels.available import KernelError, why_not
from picache.kernels.place import place_reference
from picache.kernels.placing import LayerKV, Resident, place_layers
from picache.kernels.scattered_attention import scattered_attention, scattered_attention_reference
from picache.kernels.tables import Piece, Turn

_PLACES, _ROWS, _TOKENS = 96, 24, 40


def why_no_kernels(one_token: list[KV], groups: int) -> str:
    """Why a captured pass cannot use the kernels; empty where it can.

    Args:
        one_token: keys and values of one token in each layer, on the device.
        groups: query heads that share a KV head.
    """
    tried = set()
    for keys, values in one_token:
        kind = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        if kind in tried:
            continue
        tried.add(kind)
        if reason := why_not(keys.device, keys.dtype, keys.shape[3], values.shape[3]):
            return reason
        try:
            wrong = _wrong(keys, values, groups)
        except KernelError as error:
            return str(error)
        if wrong:
            return f"the kernel {wrong} does not give on {keys.device} what its twin gives"
    return ""


@torch.no_grad()
def _wrong(keys: Tensor, values: Tensor, groups: int) -> str:
    """The first kernel whose result is not that of its twin; empty for none."""
    made = torch.Generator(keys.device).manual_seed(0)

    def drawn(heads: int, tokens: int, dim: int) -> Tensor:
        shape = (1, heads, tokens, dim)
        whole = torch.randn(shape, generator=made, device=keys.device, dtype=torch.float32)
        return whole.to(keys.dtype)

    heads, dim, value_dim = keys.shape[1], keys.shape[3], values.shape[3]
    part = drawn(heads, _TOKENS, dim), drawn(heads, _TOKENS, value_dim)
    angle = torch.arange(2 * _TOKENS * (dim // 2), device=keys.device).view(-1, dim // 2).float()
    turn = Turn(angle.cos(), angle.sin(), "half")
    pieces = [Piece(_TOKENS, 0, 0, 0, -1), Piece(_TOKENS, 3, 0, _TOKENS, 5)]
    shapes = ((1, heads, _PLACES, dim), (1, heads, _PLACES, value_dim))
    placed, expected = ([keys.new_zeros(shape) for shape in shapes] for _ in range(2))
    held = Resident.of([part])
    place_layers([LayerKV((placed[0], placed[1]), turn)], [held, held], pieces)
    key_sources, value_sources = ([[one[0], one[0]]] for one in part)
    place_reference(key_sources, value_sources, pieces, [expected[0]], [expected[1]], turn)
    if not all(map(_close, placed, expected)):
        return "place"
    query = drawn(heads * groups, _ROWS, dim)
    positions = torch.arange(_ROWS, device=keys.device)[None] * 3 - 6
    given = (query, expected[0], expected[1], positions.clamp_min(-1), dim**-0.5)
    twin = scattered_attention_reference(*given, None, None, None)
    return "" if _close(scattered_attention(*given)[0], twin[0]) else "scattered_attention"


def _close(got: Tensor, expected: Tensor) -> bool:
    bound = 1e-4 if expected.dtype == torch.float32 else 3e-2
    return bool((got - expected).float().norm() <= bound * expected.float().norm())
