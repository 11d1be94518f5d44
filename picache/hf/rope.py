"""Rotary positions of cached keys: find out how a model rotates, and move keys to new positions.

There is no table of model families. A token that is fed alone attends only to itself, so what is
cached of it at two positions differs by the rotation and nothing else. `calibrate` finds the
rotation that explains the difference, and refuses the model when none does.
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
Pairing = Literal["half", "interleaved"]
Part = Literal[0, 1]
_PAIRINGS: tuple[Pairing, ...] = ("half", "interleaved")
_PARTS: tuple[Part, ...] = (0, 1)
# The relative error (Frobenius norm) that a layer may add, for the token that is explained best. By
# rounding, attention sinks make even a token alone depend on its position, and rounding grows from
# layer to layer: a layer may double the error of the layers before it. In a mixture of experts a
# token may reach another expert at another position, but hardly all tokens do.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_PROBES = ((3, 77, 17), (150, 11, 29), (5, 40, 43), (91, 8, 61), (2, 120, 97))  # positions, token


@dataclass(frozen=True)
class Rotation:
    """How one layer rotates what it caches.

    Attributes:
        source: how the model's rotary module writes one frequency per pair of dimensions: "half"
            writes all of them and then all again, "interleaved" each one twice, "single" each once.
        pairing: which dimensions are rotated together: "half" pairs i with i + d/2, "interleaved"
            2i with 2i + 1.
        rotary_dim: how many dimensions are rotated; the others have no position.
        offset: index of the first rotated dimension. Not 0 where a key is made of a part without
            position followed by a rotated one (multi-head latent attention, MLA).
        part: which cached tensor is rotated: 0 the keys, 1 the values. It is the values where MLA
            caches a latent without position as keys, and the rotated part of the key as values.
    """

    source: Source
    pairing: Pairing
    rotary_dim: int
    offset: int = 0
    part: Part = 0

    def __str__(self) -> str:
        """The text in the keys of chunks; it must not change, or stored chunks are lost."""
        return (
            f"Rotation(source={self.source!r}, layout={self.pairing!r}, "
            f"rotary_dim={self.rotary_dim}, offset={self.offset}, part={self.part})"
        )


def frequencies(cos: Tensor, sin: Tensor, source: str) -> Angles:
    """One cos and sin per pair of dimensions, ``[tokens, rotary_dim / 2]``.

    Args:
        cos: as the model's rotary module gives it, ``[tokens, d]``.
        sin: the same.
        source: see `Rotation`.
    """
    if source == "half":
        half = cos.shape[-1] // 2
        return cos[..., :half], sin[..., :half]
    if source == "interleaved":
        return cos[..., ::2], sin[..., ::2]
    return cos, sin


def rotate_(keys: Tensor, angles: Angles, pairing: Pairing, offset: int = 0) -> Tensor:
    """Rotate keys ``[..., tokens, head_dim]`` in place, computing in fp32.

    Two dimensions are rotated for each angle, from dimension `offset` on; the others stay.
    """
    cos, sin = angles
    half = cos.shape[-1]
    turned = keys[..., offset : offset + 2 * half]
    if pairing == "half":
        a, b = turned[..., :half], turned[..., half:]
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
    new_a = a * cos - b * sin
    b.copy_(b * cos + a * sin)
    a.copy_(new_a)
    return keys


def rotate(keys: Tensor, angles: Angles, pairing: Pairing, offset: int = 0) -> Tensor:
    """A rotated copy of keys; see `rotate_`."""
    return rotate_(keys.clone(), angles, pairing, offset)


def relative_errors(actual: Tensor, expected: Tensor, dim: int) -> Tensor:
    """Relative error, in the Frobenius norm, of every slice along dimension `dim`."""
    actual, expected = (t.float().movedim(dim, 0).flatten(1) for t in (actual, expected))
    return (actual - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)


def difference(old: Angles, new: Angles) -> Angles:
    """The rotation that moves keys from their old to their new positions.

    It is made of the model's own cos and sin at both positions, so that the rounding of the model's
    fp32 angles at large positions cancels. Some models multiply cos and sin by a factor (YaRN,
    longrope). The cached keys carry that factor already, so it is divided out.
    """
    (old_cos, old_sin), (new_cos, new_sin) = old, new
    squared_factor = old_cos.square() + old_sin.square()
    cos = (new_cos * old_cos + new_sin * old_sin) / squared_factor
    sin = (new_sin * old_cos - new_cos * old_sin) / squared_factor
    return cos, sin


def calibrate(
    kv_at: Callable[[Tensor, Tensor], list[KV]],
    cos_sin: Callable[[int, Tensor], Angles],
) -> list[Rotation | None]:
    """Find the rotation of each layer; None for a layer without positions (NoPE).

    Args:
        kv_at: given positions and token ids, each ``[probes]``, returns what every layer caches of
            each token fed alone at its position: keys and values, each ``[probes, heads, 1, dim]``.
        cos_sin: given a layer and positions, returns what the model's rotary module returns, each
            ``[probes, d]``.

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
            moved[rotation.part] = rotate(part, turn, rotation.pairing, rotation.offset)
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
    """Every rotation that a rotary module with `width` cosines a token can stand for.

    Args:
        width: cosines that the rotary module gives for one token.
        dims: head dimensions of the cached keys and of the cached values.
    """
    widths: tuple[tuple[Source, int], ...] = (
        ("half", width),
        ("interleaved", width),
        ("single", 2 * width),
    )
    return [
        Rotation(source, pairing, rotary_dim, offset, part)
        for part in _PARTS
        for source, rotary_dim in widths
        if rotary_dim <= dims[part]
        for pairing in _PAIRINGS
        for offset in sorted({0, dims[part] - rotary_dim})
    ]
