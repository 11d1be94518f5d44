"""A3's query-aware selection: the tokens the query attends to in the first layer."""

from dataclasses import dataclass

from torch import Tensor

from picache.methods.base import Evidence, Layout, LinkMethod, check_ratio, top


@dataclass(frozen=True)
class A3(LinkMethod):
    """Recompute the tokens the query attends to most in layer 0 (A3, arXiv 2511.17560).

    Keys of layer 0 depend on no context, so its attention from the query is exact before anything
    is recomputed, and costs one layer of the query alone instead of CacheBlend's two of everything.
    Reimplemented from the paper's description; the mean over heads and query tokens is ours.

    Args:
        ratio: share of the reusable tokens to recompute.

    Raises:
        PICacheError: when `ratio` is outside [0, 1].
    """

    ratio: float = 0.15

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio("A3", self.ratio))

    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        """The share of tokens of the largest attention."""
        score = evidence.query_attention(layers=1)[0, layout.reusable]
        return layout.reusable[top(score, layout.share(self.ratio))]
