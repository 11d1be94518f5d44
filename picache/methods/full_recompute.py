"""Recompute everything: the upper bound that every other method is compared with."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from picache.methods.base import Evidence, Layout, LinkMethod


@dataclass(frozen=True)
class FullRecompute(LinkMethod):
    """Recompute every token after the first chunk; equal to a full prefill of the prompt."""

    @override
    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        return layout.reusable
