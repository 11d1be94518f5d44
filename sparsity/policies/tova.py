"""TOVA: evict the token that the newest query attends to least."""

from dataclasses import dataclass, replace

from torch import Tensor
from typing_extensions import override

from sparsity.policies.base import Needs, PageView
from sparsity.policies.evicting import Evicting


@dataclass(frozen=True)
class TOVA(Evicting):
    """Evict the token with the least attention of the newest query, alike for all heads of a layer.

    Oren et al., "Transformers are Multi-State RNNs" (arXiv 2401.06104). After each forward the
    newest query's attention weights are averaged over all heads of the layer; when room is needed,
    the token with the lowest weight is evicted (of equals the oldest). There are no sinks and no
    recent window.

    Departures from the paper: the newest token is never evicted right after a forward of several
    tokens. While decoding, the weights that decide are those of the query before the new token, so
    that attention never runs over more than `budget` tokens, the new one included.

    The arguments are those of `Evicting`, with shared_heads=True; a page of more than one token has
    the sum of its tokens' weights.
    """

    shared_heads: bool = True

    @property
    @override
    def keeps_sinks(self) -> bool:
        return True  # what is attended to most is kept

    @property
    @override
    def needs(self) -> Needs:
        return Needs(attention="newest", sums=1, group=self.group)

    @override
    def observe(self, query: Tensor, pages: PageView, scaling: float) -> PageView:
        assert pages.weights is not None
        return replace(pages, sums=pages.total(pages.weights)[..., None])

    @override
    def worth(self, pages: PageView) -> Tensor:
        return pages.sums[..., 0]
