"""ProphetKV's query-aware selection: the tokens the query attends to in any layer."""

from dataclasses import dataclass

from torch import Tensor

from picache.methods.base import Evidence, Layout, LinkMethod, check_ratio, top


@dataclass(frozen=True)
class ProphetKV(LinkMethod):
    """Recompute the tokens that matter to this query (ProphetKV, arXiv 2602.02579).

    Two stages: the query alone goes through every layer over the chunks as compiled; the tokens it
    attended to most, fused over all layers, are then recomputed. With ``value_norm=True`` attention
    is weighed by the length of the value it brings, the attention-norm of InfoFlow KV (arXiv
    2603.05353; its reordering of chunks is left to the caller, who orders them).

    Reimplemented from the papers' descriptions, no code being public; the fusion here is the mean
    over layers, heads and query tokens.

    Args:
        ratio: share of the reusable tokens to recompute; 0.2 is the paper's setting.
        value_norm: weigh attention by the length of the values.

    Raises:
        PICacheError: when `ratio` is outside [0, 1].
    """

    ratio: float = 0.2
    value_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio("ProphetKV", self.ratio))

    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        """The share of tokens of the largest attention."""
        attention = evidence.query_attention(value_norm=self.value_norm)[:, layout.reusable]
        return layout.reusable[top(attention.mean(dim=0), layout.share(self.ratio))]
