"""Rotary positions of cached keys: find out how a model rotates, and move keys elsewhere.

Nothing is read from a table of model families. A token alone attends only to itself, so what is
cached of it at two positions differs by the rotation and nothing else; `calibrate` looks for the
rotation that explains the difference and refuses the model when none does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from picache.chunk import KV
from picache.errors import PICacheError

Angles = tuple[Tensor, Tensor]  # cos and sin, each [tokens, rotary_dim / 2], fp32
Source = Literal["half", "interleaved", "single"]
Layout = Literal["half", "interleaved"]
Part = Literal[0, 1]
_LAYOUTS: tuple[Layout, ...] = ("half", "interleaved")
_PARTS: tuple[Part, ...] = (0, 1)
# Relative error (Frobenius) that a layer may add, of the token that is explained best. Sinks make
# even a lone token depend on its position by rounding, which grows from layer to layer, so a
# layer may double what is there; a router may choose another expert, but hardly for all tokens.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_PROBES = ((3, 77, 17), (150, 11, 29), (5, 40, 43), (91, 8, 61), (2, 120, 97))  # positions, token


@dataclass(frozen=True)
class Rotation:
    """How one layer rotates what it caches.

    Attributes:
        source: how the model lays out cos and sin: "half" as (f, f), "interleaved" as each f twice,
            "single" as f.
        layout: which dimensions form a pair: "half" i with i + d/2, "interleaved" 2i with 2i + 1.
        rotary_dim: how many dimensions are rotated; the rest pass through.
        offset: the first rotated dimension; behind the others where keys are made of a part
            without a position and a rotated one (MLA expanded per head).
        part: which cached tensor carries the position: 0 the keys; 1 the values, where MLA caches
            a latent without a position as keys and the rotated key part as values.
    """

    source: Source
    layout: Layout
    rotary_dim: int
    offset: int = 0
    part: Part = 0


def frequencies(cos: Tensor, sin: Tensor, source: str) -> Angles:
    """One cos and sin per pair of dimensions, ``[tokens, rotary_dim / 2]``."""
    if source == "half":
        half = cos.shape[-1] // 2
        return cos[..., :half], sin[..., :half]
    if source == "interleaved":
        return cos[..., ::2], sin[..., ::2]
    return cos, sin


def rotate_(keys: Tensor, angles: Angles, layout: Layout, offset: int = 0) -> Tensor:
    """Rotate the dimensions from `offset` on of keys ``[..., tokens, head_dim]`` in place, in fp32.

    As many dimensions are rotated as there are angles for, two per angle.
    """
    cos, sin = angles
    half = cos.shape[-1]
    turned = keys[..., offset : offset + 2 * half]
    if layout == "half":
        a, b = turned[..., :half], turned[..., half:]
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
    new_a = a * cos - b * sin
    b.copy_(b * cos + a * sin)
    a.copy_(new_a)
    return keys


def rotate(keys: Tensor, angles: Angles, layout: Layout, offset: int = 0) -> Tensor:
    """The same, of a copy."""
    return rotate_(keys.clone(), angles, layout, offset)


def relative_errors(actual: Tensor, expected: Tensor, dim: int) -> Tensor:
    """Relative error of every slice along `dim`, in the Frobenius norm."""
    actual, expected = (t.float().movedim(dim, 0).flatten(1) for t in (actual, expected))
    return (actual - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)


def difference(old: Angles, new: Angles) -> Angles:
    """The rotation that takes keys from the old to the new positions.

    Made of the model's own cos and sin at both places, so that the error the model's fp32 angles
    carry at large positions cancels. A scale folded into cos and sin (YaRN, longrope) is divided
    out: it is in the keys already, and both places carry the same.
    """
    (old_cos, old_sin), (new_cos, new_sin) = old, new
    scale = old_cos.square() + old_sin.square()
    cos = (new_cos * old_cos + new_sin * old_sin) / scale
    sin = (new_sin * old_cos - new_cos * old_sin) / scale
    return cos, sin


def calibrate(
    kv_at: Callable[[Tensor, Tensor], list[KV]],
    cos_sin: Callable[[int, Tensor], Angles],
) -> list[Rotation | None]:
    """Find each layer's rotation, or None where nothing cached depends on the position (NoPE).

    Args:
        kv_at: (positions, tokens), each ``[probes]``, to what every layer caches of each token
            alone at its position, keys and values, each ``[probes, heads, 1, dim]``.
        cos_sin: (layer, positions) to what the model's rotary module returns, each ``[probes, d]``.

    Raises:
        PICacheError: when no known rotation explains how a layer's keys and values move.
    """
    old, new, tokens = torch.tensor(_PROBES).T
    positions = torch.cat([old, new])
    kv = kv_at(positions, torch.cat([tokens, tokens]))
    added, grown = _TOLERANCE[kv[0][0].dtype], 0.0

    def error(layer: int, rotation: Rotation | None) -> float:
        moved, expected = ([part.tensor_split(2)[i] for part in kv[layer]] for i in (0, 1))
        if rotation is not None:
            angles = frequencies(*cos_sin(layer, positions), rotation.source)
            cos, sin = (each[:, None, None].tensor_split(2) for each in angles)
            turn = difference((cos[0], sin[0]), (cos[1], sin[1]))
            part = moved[rotation.part]
            moved[rotation.part] = rotate(part, turn, rotation.layout, rotation.offset)
        each = [relative_errors(a, b, dim=0) for a, b in zip(moved, expected, strict=True)]
        return float(torch.maximum(*each).min())

    found: list[Rotation | None] = []
    for layer, (keys, values) in enumerate(kv):
        candidates: list[Rotation | None] = [None]
        if error(layer, None) > 0:
            width = cos_sin(layer, positions)[0].shape[-1]
            candidates += _candidates(width, (keys.shape[-1], values.shape[-1]))
        errors = {candidate: error(layer, candidate) for candidate in candidates}
        best = min(errors, key=errors.__getitem__)
        tolerance = added + 2 * grown
        if not errors[best] <= tolerance:
            raise PICacheError(
                f"layer {layer}: no known rotary layout explains how its keys and values move with "
                f"the position (smallest relative error {errors[best]:.1e}, at most "
                f"{tolerance:.0e} is accepted); position-independent caching of this model would "
                "be silently wrong, use a full prefill"
            )
        grown = max(grown, errors[best])
        found.append(best)
    return found


def _candidates(width: int, dims: tuple[int, int]) -> list[Rotation]:
    """Every rotation that `width` cosines can mean: leading or trailing, in the keys or values."""
    widths: tuple[tuple[Source, int], ...] = (
        ("half", width),
        ("interleaved", width),
        ("single", 2 * width),
    )
    return [
        Rotation(source, layout, rotary_dim, offset, part)
        for part in _PARTS
        for source, rotary_dim in widths
        if rotary_dim <= dims[part]
        for layout in _LAYOUTS
        for offset in sorted({0, dims[part] - rotary_dim})
    ]
