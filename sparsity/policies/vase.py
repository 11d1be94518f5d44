"""VaSE: keep tokens with large values, and draw the others by attention."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from sparsity.errors import SparsityError
from sparsity.policies.base import Needs, PageView, check_count
from sparsity.policies.evicting import Evicting
from sparsity.policies.hashed_random import uniform
from sparsity.policies.scores import window_scores, without_rounding
from sparsity.policies.snapkv import check_kernel


@dataclass(frozen=True)
class VaSE(Evicting):
    """Keep sinks, recent tokens and those with the widest values; draw the others by attention.

    After "VaSE" (arXiv 2606.03928), from descriptions of it. The range of a token is the largest
    less the smallest entry of its value vector. The first `sinks` tokens, the newest `window` and
    the `large` tokens of widest range are kept (of equals the newest; ranges are compared to 12
    significant bits, since in the first layer a token that comes again has the same range but for
    rounding). The rest of the budget is drawn without replacement, with probabilities proportional
    to the attention of the last `window` queries, averaged and pooled over `kernel` neighbours (by
    Gumbel's trick: the tokens with the highest log(attention) + Gumbel noise).

    Departures from the paper: each KV head decides on its own. Random numbers are a hash, as in
    `Random`. The interval between evictions is ours. What the authors do about heads and
    normalisation is not known here.

    Args:
        sinks: first tokens kept, 4.
        recent: newest tokens that are protected; None for `window`.
        evict_every: tokens between two evictions while decoding.
        window: last queries whose attention decides.
        large: tokens kept for their range; None for a quarter of the budget.
        kernel: tokens pooled over, odd.
        seed: changes the random numbers.

    The other arguments are those of `Evicting`, with page_size=1.
    """

    page_size: int = field(default=1, init=False)
    sinks: int = 4
    recent: int | None = None
    shared_heads: bool = field(default=False, init=False)
    evict_every: int | None = 64
    window: int = 64
    large: int | None = None
    kernel: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self, "window", least=1)
        check_kernel(self)
        check_count(self, "seed")
        if self.large is not None:
            check_count(self, "large")
        super().__post_init__()
        protected = self.sinks + self.recent_kept + self.large_kept
        if protected >= self.budget:
            raise SparsityError(
                f"VaSE(budget={self.budget}, sinks={self.sinks}, recent={self.recent_kept}, "
                f"large={self.large_kept}): what is protected leaves nothing to draw; use a "
                f"budget above {protected}, or a smaller window or large"
            )

    @property
    @override
    def usual_recent(self) -> int:
        return self.window

    @property
    def large_kept(self) -> int:
        """Tokens kept for their range: `large`, or a quarter of the budget."""
        return self.budget // 4 if self.large is None else self.large

    @property
    @override
    def needs(self) -> Needs:
        return Needs(window=self.window, tokens=True, group=self.group)

    @override
    def worth(self, pages: PageView) -> Tensor:
        """Infinite for the widest ranges, else log(attention) plus Gumbel noise."""
        chance = window_scores(pages, self.recent_kept, self.kernel, "mean").double()
        draw = uniform(self.seed, pages).double() + 2**-25  # in (0, 1)
        worth = chance.log() - (-draw.log()).log()
        return worth.masked_fill(self._is_large(pages), torch.inf)

    def _is_large(self, pages: PageView) -> Tensor:
        """True for the `large` tokens of widest range that nothing else protects."""
        assert pages.values is not None
        dtype = torch.promote_types(pages.values.dtype, torch.float32)
        span = pages.values.amax(-1).to(dtype) - pages.values.amin(-1).to(dtype)
        span = without_rounding(span)
        protected = pages.newest(self.recent_kept) | (pages.start < self.sinks)
        span = span.masked_fill(protected, -1)  # unused places, with start -1, too
        by_age = pages.start.argsort(dim=-1, descending=True, stable=True)
        by_span = span.gather(-1, by_age).argsort(dim=-1, descending=True, stable=True)
        return (by_age.gather(-1, by_span).argsort(-1) < self.large_kept) & (span >= 0)
