"""H2O: keep the tokens with the most attention so far, and the newest."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from typing_extensions import override

from sparsity.policies.base import Needs, PageView, check_choice
from sparsity.policies.evicting import Evicting


@dataclass(frozen=True)
class H2O(Evicting):
    """Keep the tokens with the most attention so far, and the newest: half the budget each.

    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
    Models" (arXiv 2306.14048). Each token has the sum of the attention weights that every query has
    given it since it came, its own query and those of the prompt included; a query's softmax runs
    over what was held at its time. When room is needed, the token with the lowest sum is evicted
    (of equals the oldest), among those that are not among the newest `recent`.

    Plain sums favour tokens that have been there for longer. With ``normalise="age"`` the sum is
    divided by the number of tokens that have come since, the token itself included. While decoding
    that number counts the token that room is being made for, whose query has given no weights yet,
    so that the youngest tokens count for a little less than their mean.

    Departures from the paper: each KV head decides on its own, by weights averaged over the query
    heads that share it. In a prompt the sums run over all of its queries, each over all tokens
    before it, and tokens are evicted once, at its end (the paper evicts token by token). Of a cache
    taken over with `past=` the queries are gone and count as zero. From the authors' code: the sum
    of an evicted token is gone with it, and its memory is freed.

    Args:
        recent: newest tokens that are protected; None for half the budget, the paper's split.
        normalise: "none" for the paper's sums, "age" for means.

    The other arguments are those of `Evicting`; a page of more than one token has the sum of its
    tokens.
    """

    recent: int | None = None
    normalise: Literal["none", "age"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("H2O", "normalise", self.normalise, ("none", "age"))

    @property
    @override
    def usual_recent(self) -> int:
        return self.budget // 2

    @property
    @override
    def keeps_sinks(self) -> bool:
        return True  # what is attended to most is kept

    @property
    @override
    def needs(self) -> Needs:
        return Needs(attention="all", sums=1, group=self.group)

    @override
    def observe(self, query: Tensor, pages: PageView, scaling: float) -> PageView:
        assert pages.weights is not None
        return replace(pages, sums=pages.sums + pages.total(pages.weights)[..., None])

    @override
    def worth(self, pages: PageView) -> Tensor:
        if self.normalise == "none":
            return pages.sums[..., 0]
        return pages.sums[..., 0] / (pages.now - pages.start + 1)
