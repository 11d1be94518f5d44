"""ProphetKV's query-aware selection: the tokens the query attends to in any layer."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from picache.methods.base import Evidence, Layout, LinkMethod, check_ratio, top


@dataclass(frozen=True)
class ProphetKV(LinkMethod):
    """Recompute the tokens that matter to this query (ProphetKV, arXiv 2602.02579).

    There are two stages. First the query alone goes through every layer and attends to the chunks
    as compiled; then the tokens it attended to most, over all layers, are recomputed. With
    ``value_norm=True`` attention is weighted by the norm of the value it is paid to, as the
    attention-norm of InfoFlow KV (arXiv 2603.05353) is; that paper also reorders the chunks, which
    is left to the caller here.

    Written from the papers' descriptions, since no code is public. Attention is combined by the
    mean over layers, heads and query tokens.

    Args:
        ratio: share of the reusable tokens to recompute; 0.2 is the paper's setting.
        value_norm: whether to weight attention by the norm of the values.

    Raises:
        PICacheError: when `ratio` is outside [0, 1].
    """

    ratio: float = 0.2
    value_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio("ProphetKV", self.ratio))

    @override
    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        attention = evidence.query_attention(value_norm=self.value_norm)[:, layout.reusable]
        return layout.reusable[top(attention.mean(dim=0), layout.share(self.ratio))]
