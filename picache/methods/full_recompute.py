"""Recompute everything: the upper bound every other method is compared with."""

from dataclasses import dataclass

from torch import Tensor

from picache.methods.base import Evidence, Layout, LinkMethod


@dataclass(frozen=True)
class FullRecompute(LinkMethod):
    """Recompute every token after the first chunk; equal to a full prefill of the prompt."""

    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        """Every position between the first chunk and the query."""
        return layout.reusable
