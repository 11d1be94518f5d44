"""Reuse everything as compiled: the lower bound."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from picache.methods.base import Evidence, Layout, LinkMethod


@dataclass(frozen=True)
class NaiveReuse(LinkMethod):
    """Reuse every chunk as compiled; only the query is computed.

    EPIC (arXiv 2410.15332, section 5) and CacheBlend (arXiv 2405.16444) call it "fully reuse" or
    "naive".

    Args:
        force_query: whether the query is computed in full, as under every method. EPIC's code
            reuses a query that was compiled alone and recomputes its last token only, which
            handicaps this baseline; False reproduces that.
    """

    force_query: bool = True

    @override
    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        return torch.empty(0, dtype=torch.int64)
