"""Reuse everything: the lower bound."""

from dataclasses import dataclass

import torch
from torch import Tensor

from picache.plan import Layout


@dataclass(frozen=True)
class NaiveReuse:
    """Reuse every chunk as compiled; only the query is computed.

    Called "fully reuse" or "naive" in EPIC (arXiv 2410.15332, section 5) and CacheBlend (arXiv
    2405.16444). Departure from EPIC's code, which reuses an isolated query too and recomputes one
    token: here the query is recomputed in full, as under every method.
    """

    def recompute(self, layout: Layout) -> Tensor:
        """No position."""
        return torch.empty(0, dtype=torch.int64)
