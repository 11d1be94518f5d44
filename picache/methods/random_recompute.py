"""A control: the same number of tokens as LegoLink, anywhere in the chunk."""

from dataclasses import dataclass

import torch
from torch import Tensor

from picache.plan import Evidence, Layout, LinkMethod, check_tokens


@dataclass(frozen=True)
class RandomRecompute(LinkMethod):
    """Recompute `k` uniformly drawn tokens of every chunk but the first.

    The arm that tells whether a selector knows anything, at LegoLink's token budget.

    Args:
        k: tokens per chunk, clamped to the chunk's length.
        seed: the draw is a function of the seed and the layout alone.

    Raises:
        PICacheError: when `k` is not a whole number of at least 0.
    """

    k: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_tokens("RandomRecompute", self.k)

    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        """min(k, length) positions drawn without replacement in every chunk but the first."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = [
            start + torch.randperm(length, generator=generator)[: self.k]
            for start, length in zip(layout.starts[1:], layout.chunk_lengths[1:], strict=True)
        ]
        return torch.cat([torch.empty(0, dtype=torch.int64), *drawn])
