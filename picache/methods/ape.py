"""APE: chunks side by side, with adjusted attention and nothing recomputed."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from picache.arguments import real_number
from picache.methods.base import Evidence, Layout, LinkMethod, ParallelEncoding


@dataclass(frozen=True)
class APE(LinkMethod):
    """Adaptive parallel encoding (APE, arXiv 2502.05431, section 4): chunks side by side.

    Nothing is recomputed. All chunks behind the first begin at the same position and the query
    follows the longest of them, so that the order of the chunks does not matter. The attention to
    them is sharpened by a temperature T below 1, and the log-sum-exp of their scores is multiplied
    by a scale S below 1, so that many chunks side by side draw about as much attention as they
    would one after the other. Compile the chunks behind the prompt's own prefix, as the paper does:
    ``PIC(sinks=SharedPrefix(system))``.

    Positions and scale matter while decoding too: run ``generate`` inside
    ``with prompt.attached():``. Models with sliding-window layers are refused, since a window means
    nothing among tokens that share positions.

    Args:
        temperature: T; 0.9 here, the paper tunes it for each task.
        scale: S, the factor on the log-sum-exp; 0.9 here, the paper tunes it for each task.

    Raises:
        PICacheError: when either is not in (0, 1].
    """

    temperature: float = 0.9
    scale: float = 0.9

    def __post_init__(self) -> None:
        for name in ("temperature", "scale"):
            needs = f"APE needs a {name} over 0 and up to 1"
            value = real_number(needs, getattr(self, name), lambda number: 0 < number <= 1)
            object.__setattr__(self, name, value)

    @property
    @override
    def parallel(self) -> ParallelEncoding:
        return ParallelEncoding(self.temperature, self.scale)

    @override
    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        return torch.empty(0, dtype=torch.int64)
