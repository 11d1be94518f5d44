"""Recompute everything: the upper bound every other method is compared with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from picache.plan import Layout


@dataclass(frozen=True)
class FullRecompute:
    """Recompute every token after the first chunk; equal to a full prefill of the prompt."""

    def recompute(self, layout: Layout) -> Tensor:
        """Every position between the first chunk and the query."""
        return torch.arange(layout.chunk_lengths[0], layout.context_length)
