"""SnapKV: keep the tokens of a prompt that its last queries attend to."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from sparsity.errors import SparsityError
from sparsity.policies.base import Group, Needs, PageView, Policy, check_choice, check_count
from sparsity.policies.evicting import Evicting
from sparsity.policies.scores import window_scores


@dataclass(frozen=True)
class SnapKV(Evicting):
    """Compress the prompt to what its last `window` queries attend to; keep all that is decoded.

    Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation" (arXiv 2404.14469).
    The attention weights of the last `window` queries are averaged and pooled over `kernel`
    neighbours; the best tokens are kept, with the window itself, `budget` in all (of equals the
    newest). With `evict_every=n` the same is done every n tokens while decoding, by the last
    queries decoded: "SnapKV-D" (n = 128 in the reports on it). Without, memory grows while
    decoding, and a later turn compresses all that is held again.

    Departures from the paper: each KV head decides on its own, by weights averaged over the query
    heads that share it. Neighbours are neighbours among the tokens held. A prompt that comes in
    chunks is compressed after each of them. Of a cache taken over with `past=` the queries are
    gone: the window has those that came since.

    Args:
        recent: newest tokens that are protected; None for `window`.
        evict_every: tokens between two compressions while decoding; None for no compression then.
        window: last queries that decide.
        kernel: tokens pooled over, odd; 1 for none.
        pooling: "mean" or "max" over them.

    The other arguments are those of `Evicting`; a page of more than one token has the sum of its
    tokens' attention.
    """

    recent: int | None = None
    evict_every: int | None = None
    window: int = 64
    kernel: int = 5
    pooling: Group = "mean"

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_count(self, "window", least=1)
        check_kernel(self)
        check_choice(name, "pooling", self.pooling, ("mean", "max"))
        super().__post_init__()

    @property
    @override
    def usual_recent(self) -> int:
        return self.window

    @property
    @override
    def keeps_sinks(self) -> bool:
        return True  # what is attended to most is kept

    @property
    @override
    def needs(self) -> Needs:
        return Needs(window=self.window, group=self.group)

    @override
    def worth(self, pages: PageView) -> Tensor:
        return pages.total(window_scores(pages, self.recent_kept, self.kernel, self.pooling))


def check_kernel(policy: Policy, field: str = "kernel") -> None:
    """Take the pooling kernel in `field` as an int; SparsityError unless it is positive and odd."""
    check_count(policy, field, least=1)
    kernel = getattr(policy, field)
    if kernel % 2 == 0:
        raise SparsityError(
            f"{type(policy).__name__}({field}={kernel}): a token stands in the middle of its "
            f"neighbours; use an odd number such as {kernel + 1}"
        )
