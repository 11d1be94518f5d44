"""APE: chunks side by side, with adjusted attention and nothing recomputed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from picache.arguments import real_number
from picache.methods.base import Evidence, Layout, LinkMethod, ParallelEncoding


@dataclass(frozen=True)
class APE(LinkMethod):
    """Adaptive parallel encoding (APE, arXiv 2502.05431, section 4). Recomputes nothing.

    All chunks behind the first begin at the same position, the query follows the longest, and the
    order of the chunks does not matter. Attention to them is sharpened by a temperature below 1,
    and the log of the sum of exponentials of their scores is multiplied by a scale below 1, so that
    many chunks read side by side draw about what they would one after the other. Compile the chunks
    behind the prompt's own prefix, as the paper does: ``PIC(sinks=SharedPrefix(system))``.

    Positions and the scale reach into decoding: run ``generate`` inside ``with
    prompt.attached():``. Sliding-window layers, which know no side by side, are refused.

    Args:
        temperature: T; 0.9 here, the paper tunes it by task.
        scale: S; 0.9 here, the paper tunes it by task.

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
    def parallel(self) -> ParallelEncoding:
        """How the chunks are encoded."""
        return ParallelEncoding(self.temperature, self.scale)

    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        """No position."""
        return torch.empty(0, dtype=torch.int64)
