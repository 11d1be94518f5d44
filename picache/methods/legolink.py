"""EPIC's static selection: the first tokens of every chunk."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from picache.methods.base import Evidence, Layout, LinkMethod, check_tokens


@dataclass(frozen=True)
class LegoLink(LinkMethod):
    """Recompute the first `k` tokens of every chunk but the first.

    After EPIC (arXiv 2410.15332, section 4).

    The first tokens of a chunk that is compiled alone become attention sinks. Linked behind other
    chunks they would draw attention that is not due to them. Recomputed in the prompt, they attend
    to what stands before them and are sinks no more. The choice is static: it costs nothing and is
    the same in every layer, so that linking N tokens costs O(k' N), where k' counts the recomputed
    tokens.

    Departures from the authors' code: of a chunk shorter than `k` all tokens are recomputed, where
    the code goes on into the next chunk and makes duplicates; BOS tokens in the middle are dropped
    unless ``PIC(sinks="keep")``, where the code keeps them, so that its k counts the BOS. The
    paper's LegoLink-0 compiles every chunk behind four dummy tokens (its code: three and a BOS):
    that is ``k=0`` with ``PIC(sinks=DummySinks(4))``.

    Args:
        k: tokens per chunk; 16 is the setting of the paper's throughput figures. 0 recomputes
            nothing but the query.

    Raises:
        PICacheError: when `k` is not a whole number of at least 0.
    """

    k: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_tokens("LegoLink", self.k))

    @override
    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        """The first `k` positions of each chunk but the first: offset 0 of all, then 1, ..."""
        starts = torch.tensor(layout.starts[1:], dtype=torch.int64)
        lengths = torch.tensor(layout.chunk_lengths[1:], dtype=torch.int64)
        offsets = torch.arange(min(self.k, max(layout.chunk_lengths)))[:, None]
        return (starts + offsets)[offsets < lengths]
