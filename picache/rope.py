"""Rotary positions of cached keys: find out how a model rotates, and move keys elsewhere.

Nothing is read from a table of model families. A token alone attends only to itself, so its keys at
two positions differ by the rotation and nothing else; `calibrate` looks for the rotation that
explains the difference and refuses the model when none does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from picache.errors import PICacheError

Angles = tuple[Tensor, Tensor]  # cos and sin, each [tokens, rotary_dim / 2], fp32
Layout = Literal["half", "interleaved"]
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_PROBES = ((3, 77, 17), (150, 11, 29))  # (position, position, token)


@dataclass(frozen=True)
class Rotation:
    """How one layer rotates its keys.

    Attributes:
        source: how the model lays out cos and sin: "half" as (f, f), "interleaved" as each f twice,
            "single" as f.
        layout: which dimensions form a pair: "half" i with i + d/2, "interleaved" 2i with 2i + 1.
        rotary_dim: leading dimensions that are rotated; the rest pass through.
    """

    source: Literal["half", "interleaved", "single"]
    layout: Layout
    rotary_dim: int


def frequencies(cos: Tensor, sin: Tensor, source: str) -> Angles:
    """One cos and sin per pair of dimensions, ``[tokens, rotary_dim / 2]``."""
    if source == "half":
        half = cos.shape[-1] // 2
        return cos[..., :half], sin[..., :half]
    if source == "interleaved":
        return cos[..., ::2], sin[..., ::2]
    return cos, sin


def rotate(keys: Tensor, angles: Angles, layout: Layout) -> Tensor:
    """Rotate the leading dimensions of keys ``[..., tokens, head_dim]`` by angles, in fp32."""
    cos, sin = angles
    half = cos.shape[-1]
    turned, passed = keys[..., : 2 * half].float(), keys[..., 2 * half :]
    if layout == "half":
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(keys.dtype), passed], dim=-1)


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
    keys_at: Callable[[int, int], list[Tensor]],
    cos_sin: Callable[[int, Tensor], Angles],
) -> list[Rotation | None]:
    """Find each layer's rotation, or None where keys do not depend on the position (NoPE).

    Args:
        keys_at: (position, token) to the keys of every layer, each ``[1, kv_heads, 1, head_dim]``,
            of that token alone at that position.
        cos_sin: (layer, positions) to what the model's rotary module returns, each ``[tokens, d]``.

    Raises:
        PICacheError: when no known rotation explains a layer's keys.
    """
    samples = [(p0, p1, keys_at(p0, token), keys_at(p1, token)) for p0, p1, token in _PROBES]
    tolerance = _TOLERANCE[samples[0][2][0].dtype]

    def error(layer: int, rotation: Rotation) -> float:
        worst = 0.0
        for p0, p1, keys0, keys1 in samples:
            raw0 = cos_sin(layer, torch.tensor([p0]))
            raw1 = cos_sin(layer, torch.tensor([p1]))
            turn = difference(
                frequencies(*raw0, rotation.source), frequencies(*raw1, rotation.source)
            )
            actual, expected = rotate(keys0[layer], turn, rotation.layout), keys1[layer]
            scale = expected.float().abs().max().clamp_min(1e-30)
            worst = max(worst, float((actual.float() - expected.float()).abs().max() / scale))
        return worst

    found: list[Rotation | None] = []
    for layer in range(len(samples[0][2])):
        if all(torch.equal(keys0[layer], keys1[layer]) for _, _, keys0, keys1 in samples):
            found.append(None)
            continue
        width = cos_sin(layer, torch.tensor([0]))[0].shape[-1]
        head_dim = samples[0][2][layer].shape[-1]
        candidates = [
            Rotation(source, layout, 2 * width if source == "single" else width)
            for source in ("half", "interleaved", "single")
            for layout in ("half", "interleaved")
        ]
        fitting = [c for c in candidates if c.rotary_dim <= head_dim]
        errors = {c: error(layer, c) for c in fitting}
        best = min(errors, key=errors.__getitem__, default=None)
        if best is None or not errors[best] <= tolerance:
            raise PICacheError(
                f"layer {layer}: no known rotary layout explains how its keys move with the "
                f"position (smallest relative error {errors[best] if best else float('nan'):.1e}, "
                f"at most {tolerance:.0e} is accepted); position-independent caching of this "
                "model would be silently wrong, use a full prefill"
            )
        found.append(best)
    return found
