"""What a retention policy is: frozen configuration, what it needs, and pure functions on pages."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsity.arguments import take_whole_number
from sparsity.errors import SparsityError

Group = Literal["max", "mean"]


@dataclass(frozen=True)
class Needs:
    """What a cache keeps or computes for a policy; what is not declared is not computed.

    summaries: smallest and largest key of each page (`PageView.kmin`, `kmax`).
    tokens: keys and values themselves (`PageView.keys`, `values`).
    attention: the attention weights of a forward in `observe` (`PageView.weights`): those of the
        newest query, or summed over "all" queries of the forward.
    window: so many last queries are kept, and their attention weights are computed in `priority`
        (`PageView.window`), that is only when something is evicted.
    sums: so many numbers are kept for each page (`PageView.sums`), zero when it is opened.
    group: how weights are reduced over the query heads that share a KV head.
    moved: so many first tokens of a row, which are never evicted and lie in pages of one token, are
        attended to where they stand inside the cache: as near to the rest as if what was dropped
        behind them had never been there. All other positions are those of the text.
    """

    summaries: bool = False
    tokens: bool = False
    attention: Literal["newest", "all"] | None = None
    window: int = 0
    sums: int = 0
    group: Group = "mean"
    moved: int = 0

    def __post_init__(self) -> None:
        if self.moved and (self.attention or self.window or self.summaries):
            raise SparsityError(
                f"{self}: attention weights and page summaries are those of keys at their place in "
                "the text, and moved keys are attended to at another; a policy cannot need both"
            )


@dataclass(frozen=True)
class PageView:
    """What a policy may look at: the pages one layer holds. P pages a KV head, used or not.

    N = P * page_size tokens; a rank counts a row's real tokens, 0 is the first. What `Needs` does
    not declare is None.

    start: rank of each page's first token, -1 where the place is unused; `[batch, kv_heads, P]`.
    stamp: a rank for each page, at first that of its first token; `[batch, kv_heads, P]`.
    sums: the policy's own numbers, float32 or more, `[batch, kv_heads, P, sums]`.
    pinned: True for pages that are never evicted; bool `[batch, kv_heads, P]`.
    filled: True where a place holds a token; bool `[batch, kv_heads, N]`.
    kmin, kmax: elementwise smallest and largest key, `[batch, kv_heads, P, head_dim]`.
    keys, values: `[batch, kv_heads, N, head_dim]`.
    weights: attention of the forward just done, `[batch, kv_heads, N]`; in `observe` only.
    window: attention of the last queries, each over the tokens held that are not newer than it,
        zero for a query that was not seen; `[batch, kv_heads, window, N]`; in `priority` only.
    now: rank of each row's newest token, the one about to be written included; `[batch, 1, 1]`.
    page_size: tokens a page. layer: index of the layer in the model. first_head: index in the
        layer of the first KV head here (tensor parallelism leaves the others to other processes).
    """

    start: Tensor
    stamp: Tensor
    sums: Tensor
    pinned: Tensor
    filled: Tensor
    kmin: Tensor | None
    kmax: Tensor | None
    keys: Tensor | None
    values: Tensor | None
    weights: Tensor | None
    window: Tensor | None
    now: Tensor
    page_size: int
    layer: int
    first_head: int = 0

    @property
    def used(self) -> Tensor:
        """True where a page holds tokens: bool `[batch, kv_heads, P]`."""
        return self.start >= 0

    @property
    def rank(self) -> Tensor:
        """Rank of each token's place, -1 where the page is unused: `[batch, kv_heads, N]`."""
        if self.page_size == 1:
            return self.start
        inside = torch.arange(self.page_size, device=self.start.device)
        rank = (self.start[..., None] + inside).masked_fill(~self.used[..., None], -1)
        return rank.flatten(2)

    def newest(self, tokens: int) -> Tensor:
        """True for pages with one of the newest `tokens` of the row: bool, as `start`."""
        return self.used & (self.start + self.page_size - 1 > self.now - tokens)

    def total(self, tokens: Tensor) -> Tensor:
        """`[batch, kv_heads, N]` summed over each page's tokens: `[batch, kv_heads, P]`."""
        return tokens.unflatten(-1, (-1, self.page_size)).sum(-1)


class Policy(ABC):
    """A retention policy: configuration only, shared freely; all state stays in the cache.

    A policy is a frozen dataclass with the fields below (those it does not offer are fixed), what
    it needs, and the methods it needs. Every decision is made for each row and each KV head on its
    own, or alike for all heads where the priorities are.

    budget: tokens that one KV head keeps or attends to; None for no bound.
    page_size: tokens that are kept or evicted together; it divides `budget`.
    dense_layers: this many first layers of the model keep and attend to everything.
    pin_prompt: tokens that arrive several at a time (the prompt, later turns) are never evicted.
    pins_kept: pin what is left after several tokens at a time, instead of what they bring.
    pins_count: whether pinned tokens count against the budget.
    evict_every: while decoding, tokens between two evictions; None for no eviction while decoding.
    """

    budget: int | None
    page_size: int
    dense_layers: int
    pin_prompt: bool
    pins_count: bool = True
    pins_kept: bool = False
    evict_every: int | None = 1

    @property
    @abstractmethod
    def evicts(self) -> bool:
        """Whether tokens beyond the budget are dropped for good."""

    @property
    def needs(self) -> Needs:
        """What the cache keeps and computes for this policy."""
        return Needs()

    @property
    def pages_kept(self) -> int | None:
        """Pages a KV head keeps when it evicts; None for a policy that does not."""
        if not self.evicts or self.budget is None:
            return None
        return self.budget // self.page_size

    @property
    def pages_held(self) -> int | None:
        """Most pages a KV head holds while decoding, between two evictions; None for no bound."""
        if self.pages_kept is None or self.evict_every is None:
            return None
        return self.pages_kept + -(-self.evict_every // self.page_size) - 1

    @property
    def decoding(self) -> "Policy":
        """The policy that evicts while single tokens come (`Then`; others are one for all)."""
        return self

    def at_layer(self, layer: int, layers: int) -> "Policy":
        """The policy of layer `layer` of so many `layers` with full attention."""
        return self

    def priority(self, pages: PageView) -> Tensor:
        """Worth of each page, float32 `[batch, kv_heads, P]`: the least is evicted first.

        Among equals the oldest page goes first. Infinity protects a page as long as there is
        another one; the page of the newest token and pinned pages are never evicted whatever their
        worth. Ranks are exact in float32 up to 2**24 tokens a row.
        """
        raise NotImplementedError(f"{type(self).__name__} evicts but defines no priority")

    def observe(self, query: Tensor, pages: PageView, scaling: float) -> PageView:
        """The pages with new `stamp` or `sums` after a forward.

        query: the newest token's query, `[batch, query_heads, head_dim]`.
        scaling: factor on a query-key product before the softmax.
        """
        return pages

    def select(self, query: Tensor, pages: PageView) -> Tensor | None:
        """Places of the pages a single new token attends to, int64 `[batch, kv_heads, K]`.

        None for all pages. query: `[batch, query_heads, head_dim]`.
        """
        return None


def reduce_group(scores: Tensor, group: Group) -> Tensor:
    """`[batch, kv_heads, query_heads / kv_heads, ...]` reduced over axis 2: one score a KV head."""
    return scores.amax(2) if group == "max" else scores.mean(2)


def check_budget(policy: Policy, field: str = "budget") -> None:
    """Take the budget in `field` and the page size as ints.

    Raises SparsityError unless the budget is a positive multiple of the page size (both tokens).
    """
    check_count(policy, "page_size", least=1)
    check_count(policy, field, least=1)
    budget, size = getattr(policy, field), policy.page_size
    if budget % size:
        raise SparsityError(
            f"{type(policy).__name__}({field}={budget}, page_size={size}): the budget must be a "
            f"multiple of the page size; use {field}={max(1, round(budget / size)) * size}"
        )


def check_count(policy: Policy, field: str, least: int = 0) -> None:
    """Take the number in `field` as an int; SparsityError unless it is whole and at least `least`.

    The field then holds the int, so that equality and repr are those of the int.
    """
    note = " tokens" if field in ("budget", "page_size") else ""
    note += "; Full() is the policy without a budget" if field == "budget" else ""
    take_whole_number(policy, field, least, note)


def check_choice(name: str, field: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise SparsityError unless `value` is one of `choices`."""
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise SparsityError(f"{name}({field}={value!r}): expected {expected}")


def check_group(name: str, group: str) -> None:
    """Raise SparsityError unless `group` is a known reduction over the query heads of a group."""
    check_choice(name, "group", group, ("max", "mean"))
