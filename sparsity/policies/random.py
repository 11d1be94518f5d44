"""Random eviction: the baseline that a score has to beat."""

from dataclasses import dataclass, field

from torch import Tensor
from typing_extensions import override

from sparsity.policies.base import Group, PageView, check_count
from sparsity.policies.evicting import Evicting
from sparsity.policies.hashed_random import uniform


@dataclass(frozen=True)
class Random(Evicting):
    """Evict a random token, for each KV head on its own; keep the prompt by default.

    "Random Attention" (arXiv 2609.03430) reports that evicting at random with the prompt kept is a
    strong baseline for reasoning. Each time room is needed, a token is drawn uniformly among those
    that are neither pinned nor among the newest `recent`; when there is none, the oldest of the
    recent ones goes.

    Departures from the paper: tokens go one at a time, exactly when room is needed (unless
    `evict_every` says otherwise). Random numbers are a hash of (seed, layer, KV head, token, step)
    and not the output of a generator with a state, so that a row's result depends neither on the
    rest of its batch nor on padding, and `reset` brings the same numbers again; the rows of one
    batch share them.

    Args:
        recent: newest tokens that are protected; no default was found in the paper.
        seed: changes the random numbers.

    The other arguments are those of `Evicting`, with page_size=1 and pin_prompt=True.
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

    @override
    def worth(self, pages: PageView) -> Tensor:
        return uniform(self.seed, pages)
