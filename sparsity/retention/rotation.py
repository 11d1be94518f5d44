"""Keys rotated from one position to another by the model's own rotary embedding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# From keys [batch, kv_heads, n, head_dim], their positions and the positions to rotate to, int64
# [batch, kv_heads, n] each, to the keys that the model would have made at those.
Move = Callable[[Tensor, Tensor, Tensor], Tensor]
Pairing = Literal["half", "interleaved"]


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding (RoPE) of a layer, as a `Move` of keys between positions.

    Args:
        angles: positions, int64 `[rows, n]`, to cosines and sines, float32 `[rows, n, pairs]` each.
        pairing: which two dimensions are rotated together, of the first 2 * pairs: "half" i and i +
            pairs, "interleaved" 2i and 2i + 1. The others are not rotated.
    """

    angles: Callable[[Tensor], tuple[Tensor, Tensor]]
    pairing: Pairing

    def __call__(self, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """The keys as the model would have made them at the `new` positions, in their own dtype.

        Computed in float32 or wider from the angles at both positions, so that the rounding of
        large angles cancels, and so does a factor on cosine and sine (YaRN's attention factor),
        which the keys have already.

        Args:
            keys: `[batch, kv_heads, n, head_dim]`.
            old: their positions, int64 `[batch, kv_heads, n]`.
            new: the positions to rotate to, int64 `[batch, kv_heads, n]`.
        """
        return self.turned(keys, *self.turn(old, new, keys.device))

    def turn(self, old: Tensor, new: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angle from the `old` positions to the `new` ones.

        Args:
            old: int64 `[batch or 1, kv_heads or 1, n]`.
            new: as `old`.
            device: of the result.

        Returns:
            Two `[batch or 1, kv_heads or 1, n, pairs]`, float32.
        """
        both = torch.cat([old, new], dim=-1)
        cos, sin = (
            each.to(device).unflatten(0, both.shape[:2]).tensor_split(2, dim=2)
            for each in self.angles(both.flatten(0, 1))
        )
        (old_cos, new_cos), (old_sin, new_sin) = cos, sin
        norm = old_cos.square() + old_sin.square()
        cosine = (new_cos * old_cos + new_sin * old_sin) / norm
        sine = (new_sin * old_cos - new_cos * old_sin) / norm
        return cosine, sine

    def turned(self, keys: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """The keys `[batch, kv_heads, n, head_dim]`, rotated by an angle of `turn`."""
        pairs = cosine.shape[-1]
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        turned, rest = wide[..., : 2 * pairs], wide[..., 2 * pairs :]
        if self.pairing == "half":
            a, b = turned[..., :pairs], turned[..., pairs:]
            turned = torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)
        else:
            a, b = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack([a * cosine - b * sine, b * cosine + a * sine], -1).flatten(-2)
        return torch.cat([turned, rest], dim=-1).to(keys.dtype)


def unmoved(keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The `Move` of keys that do not depend on their position."""
    return keys
