"""Random eviction: the baseline that a score has to beat."""

from dataclasses import dataclass, field

from torch import Tensor

from sparsity.policies.base import Group, PageView, check_count
from sparsity.policies.evicting import Evicting
from sparsity.policies.hashed_random import uniform


@dataclass(frozen=True)
class Random(Evicting):
    """Evict a token drawn uniformly, for each KV head on its own; keep the prompt by default.

    "Random Attention" (arXiv 2609.03430) reports that eviction at random with the prompt kept is a
    strong baseline for reasoning. Each time room is needed, tokens are drawn among those that are
    neither pinned nor among the newest `recent`; when no such token is left, the oldest of the
    recent ones goes.

    Departures from the paper: tokens go one at a time, exactly when room is needed (unless
    `evict_every` says otherwise). Draws come from a hash of (seed, layer, KV head, token, step)
    and not from a generator with a state, so a row's result depends neither on the rest of its
    batch nor on padding, and `reset` starts the same draws again; the rows of one batch share
    their draws.

    Beyond the knobs of `Evicting`, with pin_prompt=True: recent: newest tokens that are not drawn
    (no default was found in the paper). seed: changes the draws.
    """

    page_size: int = field(default=1, init=False)
    recent: int | None = 16
    pin_prompt: bool = True
    shared_heads: bool = field(default=False, init=False)
    group: Group = field(default="mean", init=False)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "seed")

    def worth(self, pages: PageView) -> Tensor:
        """A uniform draw in [0, 1) for each token."""
        return uniform(self.seed, pages)
