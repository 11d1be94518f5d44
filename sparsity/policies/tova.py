"""TOVA: drop what the newest query attends to least."""

from dataclasses import dataclass, replace

from torch import Tensor

from sparsity.policies.base import Needs, PageView
from sparsity.policies.evicting import Evicting


@dataclass(frozen=True)
class TOVA(Evicting):
    """Evict the token with the least attention of the newest query, alike for a layer's heads.

    Oren et al., "Transformers are Multi-State RNNs" (arXiv 2401.06104). After each forward the
    newest query's attention weights are averaged over all heads of the layer; when room is needed
    the token with the least goes (of equals the oldest). No sinks, no recent window.

    Departures from the paper: the newest token is never dropped right after a forward of several
    tokens. When one token is decoded, the weights that decide are those of the query before it,
    so that attention never runs over more than `budget` tokens, itself included.

    Beyond the knobs of `Evicting`, with shared_heads=True: page_size: with more than one token a
    page, its weight is the sum of its tokens'.
    """

    shared_heads: bool = True

    @property
    def needs(self) -> Needs:
        """The newest query's weights, kept until room is needed."""
        return Needs(attention="newest", sums=1, group=self.group)

    def observe(self, query: Tensor, pages: PageView, scaling: float) -> PageView:
        """Note the weights."""
        assert pages.weights is not None
        return replace(pages, sums=pages.total(pages.weights)[..., None])

    def worth(self, pages: PageView) -> Tensor:
        """The weight."""
        return pages.sums[..., 0]
