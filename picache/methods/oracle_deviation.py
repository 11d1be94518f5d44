"""An oracle: the tokens whose reused KV is furthest from that of a full prefill."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from picache.errors import PICacheError
from picache.methods.base import Evidence, Layout, LinkMethod, Metric, check_ratio, top


@dataclass(frozen=True)
class OracleDeviation(LinkMethod):
    """Recompute the tokens of the largest true KV deviation, known from a full prefill.

    CacheBlend (arXiv 2405.16444) estimates the deviation from one early layer; here it is known for
    every layer. That makes it an upper bound for selection by deviation, and useless for serving.
    The squared distances are divided by their sum in each layer, so that no layer outweighs the
    others, and added up over the layers.

    Args:
        ratio: share of the reusable tokens to recompute.
        metric: whether the deviation of keys ("K"), of values ("V") or of both ("KV") counts.

    Raises:
        PICacheError: when `ratio` is outside [0, 1], or on an unknown metric.
    """

    ratio: float = 0.15
    metric: Metric = "KV"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio("OracleDeviation", self.ratio))
        if self.metric not in ("K", "V", "KV"):
            raise PICacheError(f"OracleDeviation: metric must be K, V or KV, got {self.metric!r}")

    @override
    def recompute(self, layout: Layout, evidence: Evidence) -> Tensor:
        deviation = evidence.true_deviation(self.metric)[:, layout.reusable]
        score = (deviation / deviation.sum(dim=1, keepdim=True).clamp_min(1e-30)).sum(dim=0)
        return layout.reusable[top(score, layout.share(self.ratio))]
