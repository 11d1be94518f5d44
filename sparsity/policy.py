"""What a retention policy is: frozen configuration plus three pure functions on page tensors."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparsity.errors import SparsityError

Group = Literal["max", "mean"]


@dataclass(frozen=True)
class PageView:
    """What a policy may look at: the pages one layer holds. P pages a KV head, used or not.

    start: rank of each page's first token in its row (0 is the row's first real token), -1 where
        the place is unused; `[batch, kv_heads, P]`.
    stamp: last refresh of each page, a rank; `[batch, kv_heads, P]`.
    kmin, kmax: elementwise smallest and largest key of each page, `[batch, kv_heads, P, head_dim]`;
        None unless the policy asks for `summaries`.
    now: rank of the newest token of each row; `[batch, 1, 1]`.
    page_size: tokens a page. layer: index of the layer in the model.
    """

    start: Tensor
    stamp: Tensor
    kmin: Tensor | None
    kmax: Tensor | None
    now: Tensor
    page_size: int
    layer: int

    @property
    def used(self) -> Tensor:
        """True where a page holds tokens: bool `[batch, kv_heads, P]`."""
        return self.start >= 0


class Policy(ABC):
    """A retention policy: configuration only, shared freely; all state stays in the cache.

    A policy is a frozen dataclass with the four fields below (those it does not offer are fixed
    with ``field(init=False)``), the two flags, and the methods it needs. Every decision is made
    for each row and each KV head on its own.

    budget: tokens that one KV head keeps or attends to; None for no bound.
    page_size: tokens that are kept or evicted together; it divides `budget`.
    dense_layers: this many first layers of the model keep and attend to everything.
    pin_prompt: tokens that arrive several at a time (the prompt, later turns) are never evicted.
    """

    budget: int | None
    page_size: int
    dense_layers: int
    pin_prompt: bool

    @property
    @abstractmethod
    def evicts(self) -> bool:
        """Whether tokens beyond the budget are dropped for good."""

    @property
    def summaries(self) -> bool:
        """Whether `kmin` and `kmax` of each page must be maintained."""
        return False

    def priority(self, pages: PageView) -> Tensor:
        """Worth of each page, float32 `[batch, kv_heads, P]`: the least is evicted first.

        Among equals the oldest page goes first. Infinity protects a page; the page of the newest
        token and pinned pages are protected by the pool already. Exact up to 2**24 tokens a row.
        """
        raise NotImplementedError(f"{type(self).__name__} evicts but defines no priority")

    def observe(self, query: Tensor, pages: PageView, scaling: float) -> Tensor | None:
        """New stamps `[batch, kv_heads, P]` after a forward, or None to leave them.

        query: the newest token's query, `[batch, query_heads, head_dim]`.
        scaling: factor on a query-key product before the softmax.
        """
        return None

    def select(self, query: Tensor, pages: PageView) -> Tensor | None:
        """Places of the pages a single new token attends to, int64 `[batch, kv_heads, K]`.

        None for all pages. query: `[batch, query_heads, head_dim]`.
        """
        return None


def check_budget(name: str, budget: int, page_size: int) -> None:
    """Raise SparsityError unless `budget` is a positive multiple of `page_size` (both tokens)."""
    check_count(name, "page_size", page_size, least=1)
    check_count(name, "budget", budget, least=1)
    if budget % page_size:
        raise SparsityError(
            f"{name}(budget={budget}, page_size={page_size}): the budget must be a multiple of the "
            f"page size; use budget={max(1, round(budget / page_size)) * page_size}"
        )


def check_count(name: str, field: str, value: int, least: int = 0) -> None:
    """Raise SparsityError unless `value` is an int of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SparsityError(
            f"{name}({field}={value!r}): expected a whole number of at least {least}"
            + (" tokens" if field in ("budget", "page_size") else "")
            + ("; Full() is the policy without a budget" if field == "budget" else "")
        )


def check_group(name: str, group: str) -> None:
    """Raise SparsityError unless `group` is a known reduction over the query heads of a group."""
    if group not in ("max", "mean"):
        raise SparsityError(f"{name}(group={group!r}): expected 'max' or 'mean'")
