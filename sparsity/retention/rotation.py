"""Keys moved to another position: by how far, the model's own rotary angles say."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Keys [batch, kv_heads, n, head_dim], and the positions they stand at and are to stand at, int64
# [batch, kv_heads, n]; to keys as the model would have made them there.
Move = Callable[[Tensor, Tensor, Tensor], Tensor]
Layout = Literal["half", "interleaved"]


@dataclass(frozen=True)
class Rotation:
    """A layer's rotary positions (RoPE): a `Move`.

    angles: positions, int64 `[rows, n]`, to cos and sin, float32 `[rows, n, pairs]` each.
    layout: which of the first 2 * pairs dimensions are a pair: "half" i with i + pairs,
        "interleaved" 2i with 2i + 1. The dimensions behind them are not rotated.
    """

    angles: Callable[[Tensor], tuple[Tensor, Tensor]]
    layout: Layout

    def __call__(self, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """The keys in their own dtype, turned in float32 or more.

        From the angles at both places: rounding of large angles, and a scale folded into cos and
        sin (YaRN), which is in the keys already, cancel.
        """
        both = torch.cat([old, new], dim=-1)
        cos, sin = (
            each.to(keys.device).unflatten(0, both.shape[:2]).tensor_split(2, dim=2)
            for each in self.angles(both.flatten(0, 1))
        )
        (old_cos, new_cos), (old_sin, new_sin) = cos, sin
        scale = old_cos.square() + old_sin.square()
        cosine = (new_cos * old_cos + new_sin * old_sin) / scale
        sine = (new_sin * old_cos - new_cos * old_sin) / scale
        pairs = scale.shape[-1]
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        turned, rest = wide[..., : 2 * pairs], wide[..., 2 * pairs :]
        if self.layout == "half":
            a, b = turned[..., :pairs], turned[..., pairs:]
            turned = torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)
        else:
            a, b = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack([a * cosine - b * sine, b * cosine + a * sine], -1).flatten(-2)
        return torch.cat([turned, rest], dim=-1).to(keys.dtype)


def unmoved(keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The `Move` of keys that are the same wherever they stand."""
    return keys
