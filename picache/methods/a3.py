"""A3's query-aware selection: the tokens the query attends to in the first layer."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from picache.methods.base import Evidence, Layout, LinkMethod, check_ratio, top


@dataclass(frozen=True)
class A3(LinkMethod):
    """Recompute the tokens the query attends to most in layer 0 (A3, arXiv 2511.17560).

    The keys of layer 0 depend on no context. The query's attention to them is therefore exact
    before anything is recomputed, and costs one layer of the query alone, where CacheBlend runs two
    layers of every token. Written from the paper's description; the paper does not say how heads
    and query tokens are combined, here by their mean.

    Args:
        ratio: share of the reusable tokens to recompute.

    Raises:
        PICacheError: when `ratio` is outside [0, 1].
    """

    ratio: float = 0.15

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio("A3", self.ratio))

    @override
    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        score = evidence.query_attention(layers=1)[0, layout.reusable]
        return layout.reusable[top(score, layout.share(self.ratio))]
