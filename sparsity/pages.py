"""The page pool of one layer: K/V in pages whose places are used again in place."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsity.policy import PageView, Policy
from sparsity.rows import Step, max_pages


@dataclass
class PagePool:
    """K/V of one layer in pages, decided for each KV head on its own.

    C places for pages of `size` tokens, N = C * size places for tokens; a page lies anywhere, and
    a row whose pool is not full uses the places 0, 1, ... in order.

    keys, values: `[batch, kv_heads, N, head_dim]`. slots: the column each token stands at, int32
    `[batch, kv_heads, N]`, -1 where empty. start, stamp, kmin, kmax: see `PageView`. pinned: bool
    `[batch, kv_heads, C]`. current: place of each row's newest page, int64 `[batch, kv_heads]`.
    """

    size: int
    layer: int
    keys: Tensor
    values: Tensor
    slots: Tensor
    start: Tensor
    stamp: Tensor
    pinned: Tensor
    kmin: Tensor | None
    kmax: Tensor | None
    current: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, by name."""
        return {name: v for name, v in vars(self).items() if isinstance(v, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> "PagePool":
        """The pool with `change` done to every tensor; batch is the first axis of each."""
        changed: dict[str, Any] = {name: change(v) for name, v in self.tensors().items()}
        return replace(self, **changed)

    def used_pages(self, longest: int) -> int:
        """Places that may hold a page when the longest row has `longest` real tokens."""
        return min(-(-longest // self.size), self.start.shape[-1])

    def view(self, now: Tensor, pages: int) -> PageView:
        """The first `pages` places for a policy. now: rank of the newest tokens, `[batch]`."""
        return PageView(
            start=self.start[..., :pages],
            stamp=self.stamp[..., :pages],
            kmin=None if self.kmin is None else self.kmin[:, :, :pages],
            kmax=None if self.kmax is None else self.kmax[:, :, :pages],
            now=now[:, None, None],
            page_size=self.size,
            layer=self.layer,
        )

    def write(self, key: Tensor, value: Tensor, step: Step, policy: Policy) -> None:
        """Write one token a row, in place, evicting a page first where one is needed.

        key, value: `[batch, kv_heads, 1, head_dim]`.
        """
        batch, heads = self.current.shape
        b = torch.arange(batch, device=key.device)[:, None]
        h = torch.arange(heads, device=key.device)[None]
        opens = step.before % self.size == 0
        if step.valid is not None:
            opens = opens & step.valid[:, -1]
        opens = opens[:, None]
        may_open = step.then.ragged or step.longest_before % self.size == 0
        if may_open:
            self._grow(step.longest_after, max_pages(policy))
            self._open(opens, b, h, step, policy)
        page = self.current
        place = page * self.size + (step.before % self.size)[:, None]
        new_key, new_value, column = key[:, :, 0], value[:, :, 0], step.stop - 1
        slot = torch.full_like(place, column, dtype=torch.int32)
        keep_low, keep_high = new_key, new_key
        if step.valid is not None:  # a row whose new column is padding keeps what it has
            real = step.valid[:, -1:]
            new_key = torch.where(real[..., None], new_key, self.keys[b, h, place])
            new_value = torch.where(real[..., None], new_value, self.values[b, h, place])
            slot = torch.where(real, slot, self.slots[b, h, place])
            if self.kmin is not None and self.kmax is not None:
                keep_low = torch.where(real[..., None], keep_low, self.kmin[b, h, page])
                keep_high = torch.where(real[..., None], keep_high, self.kmax[b, h, page])
        self.keys[b, h, place] = new_key
        self.values[b, h, place] = new_value
        self.slots[b, h, place] = slot
        if self.kmin is not None and self.kmax is not None:
            low, high = self.kmin[b, h, page], self.kmax[b, h, page]
            if may_open:
                low = torch.where(opens[..., None], keep_low, low)
                high = torch.where(opens[..., None], keep_high, high)
            self.kmin[b, h, page] = torch.minimum(low, keep_low)
            self.kmax[b, h, page] = torch.maximum(high, keep_high)

    def _open(self, opens: Tensor, b: Tensor, h: Tensor, step: Step, policy: Policy) -> None:
        """Give the rows of `opens` (bool `[batch, 1]`) an empty page."""
        place = (step.before // self.size)[:, None].expand_as(self.current)
        limit = max_pages(policy)
        if limit is not None and step.longest_before >= limit * self.size:
            pages = self.view(step.before, limit)
            worth = policy.priority(pages).masked_fill(self.pinned, torch.inf)
            place = torch.where(place < limit, place, least(worth, pages.start))
        self.current = torch.where(opens, place, self.current)
        page = self.current
        rank = step.before[:, None].to(torch.int32).expand_as(page)
        self.start[b, h, page] = torch.where(opens, rank, self.start[b, h, page])
        self.stamp[b, h, page] = torch.where(opens, rank, self.stamp[b, h, page])
        self.pinned[b, h, page] = self.pinned[b, h, page] & ~opens
        slots = self.slots.unflatten(-1, (-1, self.size))
        slots[b, h, page] = slots[b, h, page].masked_fill(opens[..., None], -1)

    def _grow(self, longest: int, limit: int | None) -> None:
        """Make places for a row of `longest` tokens, in modest steps, up to `limit` pages."""
        have = self.start.shape[-1]
        need = -(-longest // self.size)
        need = need if limit is None else min(need, limit)
        if need <= have:
            return
        more = max(need - have, -(-64 // self.size), have // 8)
        more = more if limit is None else min(more, limit - have)

        def longer(old: Tensor, places: int, empty: int) -> Tensor:
            shape = (*old.shape[:2], places, *old.shape[3:])
            return torch.cat([old, old.new_full(shape, empty)], dim=2)

        self.keys = longer(self.keys, more * self.size, 0)
        self.values = longer(self.values, more * self.size, 0)
        self.slots = longer(self.slots, more * self.size, -1)
        self.start = longer(self.start, more, -1)
        self.stamp = longer(self.stamp, more, -1)
        self.pinned = longer(self.pinned, more, 0)
        if self.kmin is not None and self.kmax is not None:
            self.kmin, self.kmax = longer(self.kmin, more, 0), longer(self.kmax, more, 0)


def least(worth: Tensor, start: Tensor) -> Tensor:
    """Place of the page with the least worth, of equals the oldest: `[..., P]` to `[...]`."""
    tied = worth == worth.amin(-1, keepdim=True)
    return start.masked_fill(~tied, torch.iinfo(start.dtype).max).argmin(-1)


def best(worth: Tensor, start: Tensor, count: int) -> Tensor:
    """Places of the `count` pages with the most worth, of equals the newest, oldest page first.

    Places without a page (start -1) come last. `[..., P]` to int64 `[..., count]`.
    """
    worth = worth.masked_fill(start < 0, -torch.inf)
    by_age = start.argsort(dim=-1, descending=True, stable=True)
    by_worth = worth.gather(-1, by_age).argsort(dim=-1, descending=True, stable=True)
    kept = by_age.gather(-1, by_worth)[..., :count]
    age = start.gather(-1, kept)
    age = age.masked_fill(age < 0, torch.iinfo(age.dtype).max)
    return kept.gather(-1, age.argsort(dim=-1, stable=True))
