"""What a retention policy is: a frozen configuration, what it needs, and functions on pages."""

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
    """What the cache keeps and computes for a policy beyond keys and values; the rest is skipped.

    Args:
        summaries: keep the elementwise smallest and largest key of each page (`PageView.kmin` and
            `kmax`).
        tokens: show the keys and values themselves (`PageView.keys` and `values`).
        attention: compute attention weights in every forward, for `Policy.observe`
            (`PageView.weights`): those of the newest token's query ("newest"), or the sum over all
            queries of the forward ("all").
        window: keep the queries of this many newest tokens and compute their attention weights for
            `Policy.priority` (`PageView.window`), that is, only when something is to be evicted.
        sums: keep this many numbers for each page (`PageView.sums`), which `Policy.observe`
            updates; a new page has zeros.
        group: how attention weights are reduced over the query heads that share a KV head.
        moved: sink tokens, the first this many of a row, whose rotary position moves forward by the
            number of evicted tokens, so that they stand right before the other tokens held
            (StreamingLLM, arXiv 2309.17453, section 3.2). Such a policy never evicts them and has
            pages of one token. All other tokens keep their position in the text.

    Raises:
        SparsityError: for arguments out of range, and for `moved` together with `attention`,
            `window` or `summaries`, which are computed from keys at their position in the text.
    """

    summaries: bool = False
    tokens: bool = False
    attention: Literal["newest", "all"] | None = None
    window: int = 0
    sums: int = 0
    group: Group = "mean"
    moved: int = 0

    def __post_init__(self) -> None:
        for field in ("window", "sums", "moved"):
            if type(getattr(self, field)) is not int or getattr(self, field) < 0:
                take_whole_number(self, field, least=0)
        check_choice("Needs", "attention", self.attention, (None, "newest", "all"))
        check_group("Needs", self.group)
        if self.moved and (self.attention or self.window or self.summaries):
            raise SparsityError(
                f"{self}: attention weights and page summaries are those of keys at their position "
                "in the text, and moved keys are attended to at another; a policy cannot need both"
            )


@dataclass(frozen=True)
class PageView:
    """The pages that one layer holds, as a policy sees them; P pages for each KV head, used or not.

    A page is `page_size` consecutive tokens of a row, kept or evicted together; N = P * page_size.
    A place is where a page lies in the tensors below: places are in no order, since a new page
    takes the place of an evicted one. A rank is the number of a token among the real tokens of its
    row, padding not counted; the first is 0. What the policy's `Needs` do not ask for is None.

    Attributes:
        start: rank of each page's first token, -1 where the place is unused; int32
            `[batch, kv_heads, P]`.
        stamp: a rank that `Policy.observe` may set, at first that of the page's first token; int32
            `[batch, kv_heads, P]`.
        sums: the policy's own numbers, float32 or wider, `[batch, kv_heads, P, Needs.sums]`.
        pinned: True for pages that are never evicted; bool `[batch, kv_heads, P]`.
        filled: True where there is a token; bool `[batch, kv_heads, N]`.
        kmin: elementwise smallest key of each page, `[batch, kv_heads, P, head_dim]`.
        kmax: elementwise largest key of each page, `[batch, kv_heads, P, head_dim]`.
        keys: `[batch, kv_heads, N, head_dim]`, rotated by their position in the text.
        values: `[batch, kv_heads, N, value_dim]`.
        weights: attention weights of the forward just done, `[batch, kv_heads, N]`; in
            `Policy.observe` only.
        window: attention weights of the last queries, each over the tokens held that are not newer
            than itself, `[batch, kv_heads, Needs.window, N]`; zeros for a query that was not seen
            (of a cache taken over with `past=`). In `Policy.priority` only.
        now: rank of each row's newest token, int64 `[batch, 1, 1]`; while room is made for a token,
            the rank of that token.
        page_size: tokens a page.
        layer: index of the layer in the model.
        first_head: index in the layer of the first KV head here; above 0 only under tensor
            parallelism, where each process holds some of the heads.
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
        """Rank of the token in each place, -1 where the page is unused: `[batch, kv_heads, N]`."""
        if self.page_size == 1:
            return self.start
        inside = torch.arange(self.page_size, device=self.start.device)
        rank = (self.start[..., None] + inside).masked_fill(~self.used[..., None], -1)
        return rank.flatten(2)

    def newest(self, tokens: int) -> Tensor:
        """True for pages with a token of the newest `tokens`: bool `[batch, kv_heads, P]`."""
        return self.used & (self.start + self.page_size - 1 > self.now - tokens)

    def total(self, tokens: Tensor) -> Tensor:
        """Numbers of tokens summed over each page: `[batch, kv_heads, N]` to `[..., P]`."""
        if self.page_size == 1:
            return tokens
        return tokens.unflatten(-1, (-1, self.page_size)).sum(-1)


class Policy(ABC):
    """A retention policy: which tokens a KV cache keeps, and which of them a new token attends to.

    A policy is a frozen dataclass with the fields below and no state: what it must remember lies in
    the cache, in `PageView.stamp` and `sums`. A field that a policy does not offer is fixed with
    ``field(default=..., init=False)``. Decisions are made for each row and each KV head on its own.
    `Evicting` is the base of policies that drop what is worth least.

    Attributes:
        budget: tokens that a KV head keeps or, for a policy that evicts nothing, attends to; None
            for no bound.
        page_size: tokens that are kept or evicted together; divides `budget`.
        dense_layers: this many first layers of the model keep everything and attend to everything.
        pin_prompt: never evict tokens that arrived several in one forward (the prompt, the text of
            later turns).
        pins_count: whether pinned tokens count against the budget.
        pins_kept: pin what is left once a forward of several tokens has been pruned, instead of the
            tokens that it brought.
        evict_every: while decoding, tokens between two evictions; None to evict only after forwards
            of several tokens.
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
        """What the cache keeps and computes for this policy; nothing by default."""
        return Needs()

    @property
    def pages_kept(self) -> int | None:
        """Pages that a KV head has after an eviction; None for a policy that does not evict."""
        if not self.evicts or self.budget is None:
            return None
        return self.budget // self.page_size

    @property
    def pages_held(self) -> int | None:
        """Most pages that a KV head holds while decoding, before an eviction; None for no bound."""
        kept = self.pages_kept
        if kept is None or self.evict_every is None:
            return None
        return kept + -(-self.evict_every // self.page_size) - 1

    @property
    def keeps_sinks(self) -> bool:
        """Whether a text's first tokens stay in a model that attends to them most of all.

        They do where nothing is evicted, where they are protected or pinned, and where what is
        attended to most is kept.
        """
        return not self.evicts or self.pin_prompt

    @property
    def decoding(self) -> "Policy":
        """The policy that evicts while single tokens arrive: itself, but for `Then`."""
        return self

    def at_layer(self, layer: int, layers: int) -> "Policy":
        """The policy of one layer, where budgets differ by layer; itself by default.

        Args:
            layer: number of the layer among those with full attention, from 0.
            layers: how many layers with full attention the model has.
        """
        return self

    def priority(self, pages: PageView) -> Tensor:
        """How much each page is worth keeping: the page with the lowest priority is evicted first.

        Of equals the page with the least `tie` goes first, of equals in that the oldest. Infinity
        protects a page as long as any other is left. Pinned pages and the page of the newest token
        are never evicted, whatever their priority.

        Args:
            pages: what one layer holds.

        Returns:
            Floating point, `[batch, kv_heads, P]`. Ranks are exact in float32 up to 2**24 tokens a
            row.
        """
        raise NotImplementedError(f"{type(self).__name__} evicts but defines no priority")

    def tie(self, pages: PageView) -> Tensor | None:
        """What decides between pages of one priority: the one with the least goes first.

        Args:
            pages: as of `priority`; `PageView.window` is not there.

        Returns:
            Floating point, `[batch, kv_heads, P]`; None, the default, for age alone.
        """
        return None

    def observe(self, query: Tensor, pages: PageView, scaling: float) -> PageView:
        """The pages with new `stamp` or `sums` after a forward; unchanged by default.

        Args:
            query: of each row's newest token, `[batch, query_heads, head_dim]`.
            pages: what one layer holds, the new tokens included, before anything is evicted.
            scaling: factor on a query-key product before the softmax (head_dim ** -0.5 in most
                models).
        """
        return pages

    def select(self, query: Tensor, pages: PageView) -> Tensor | None:
        """The places of the pages that a single new token attends to; None, the default, for all.

        Args:
            query: of the new token, `[batch, query_heads, head_dim]`.
            pages: what one layer holds, the new token included.

        Returns:
            int64 `[batch, kv_heads, K]`, or None.
        """
        return None


def reduce_group(scores: Tensor, group: Group) -> Tensor:
    """`[batch, kv_heads, query_heads / kv_heads, ...]` reduced over axis 2: one score a KV head."""
    return scores.amax(2) if group == "max" else scores.mean(2)


def check_budget(policy: Policy, field: str = "budget") -> None:
    """Convert the budget in `field` and the page size to ints (both in tokens).

    Raises:
        SparsityError: unless the budget is a positive multiple of the page size.
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
    """Convert the number in `field` to an int, so that equality and repr are those of the int.

    Raises:
        SparsityError: unless it is a whole number of at least `least`.
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
