"""A control: as many tokens as another method recomputes, drawn at random."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from picache.arguments import whole_number
from picache.errors import PICacheError
from picache.methods.base import Evidence, Layout, LinkMethod, check_ratio, check_tokens


@dataclass(frozen=True)
class RandomRecompute(LinkMethod):
    """Recompute uniformly drawn tokens: `k` of every chunk but the first, or a `ratio` of all.

    A method is worth its cost only where it does better than this one with as many tokens: `k` is
    the budget of LegoLink, `ratio` that of CacheBlend, A3 and ProphetKV.

    Args:
        k: tokens of each chunk; all of a chunk that has no more.
        seed: of the draw, which depends on the seed and the layout alone.
        ratio: share of the reusable tokens, rounded down, drawn from all of them at once.

    Raises:
        PICacheError: unless exactly one of `k` and `ratio` is given, `k` a whole number of at least
            0, `ratio` in [0, 1], and `seed` a whole number.
    """

    k: int | None = None
    seed: int = 0
    ratio: float | None = None

    def __post_init__(self) -> None:
        if (self.k is None) == (self.ratio is None):
            raise PICacheError(
                f"RandomRecompute needs one budget, got k={self.k!r} and ratio={self.ratio!r}: "
                "give k=16 for tokens per chunk, or ratio=0.15 for a share of all"
            )
        if self.k is not None:
            object.__setattr__(self, "k", check_tokens("RandomRecompute", self.k))
        if self.ratio is not None:
            object.__setattr__(self, "ratio", check_ratio("RandomRecompute", self.ratio))
        seed = whole_number("RandomRecompute needs a whole number as its seed", self.seed)
        object.__setattr__(self, "seed", seed)

    @override
    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if self.ratio is not None:
            everything = layout.reusable
            drawn = torch.randperm(len(everything), generator=generator)
            return everything[drawn[: layout.share(self.ratio)]]
        by_chunk = [
            start + torch.randperm(length, generator=generator)[: self.k]
            for start, length in zip(layout.starts[1:], layout.chunk_lengths[1:], strict=True)
        ]
        return torch.cat([torch.empty(0, dtype=torch.int64), *by_chunk])
