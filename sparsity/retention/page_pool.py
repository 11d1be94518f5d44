"""The page pool of one layer: keys and values in pages whose places are used again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsity.policies.base import PageView, Policy
from sparsity.retention.batch_rows import Step
from sparsity.retention.eviction import eviction_order, observe
from sparsity.retention.query_weights import Weigh, keep_last
from sparsity.retention.several_tokens import (
    SeveralTokens,
    kept_places,
    lay_out,
    left_of_a_prompt,
    prune,
    take_pages,
    take_tokens,
)

# A pool that is full grows by one place in SHARE, or by places for LEAST tokens if those are more.
# Each step then copies SHARE tokens on average, which is little beside what attention reads.
SHARE, LEAST = 16, 16


@dataclass
class PagePool:
    """Keys and values of one layer in pages of `size` tokens; each KV head has pages of its own.

    There are C places for pages, and N = C * size for tokens. A page may lie in any place, and a
    new one takes the first free place. After a forward of several tokens there are as many places
    as pages. While decoding they become more with the text, by a sixteenth at a time, so that it
    happens rarely and little is empty. Under a policy that bounds the pages held there are never
    more places than that, and once they are there decoding allocates nothing.

    Attributes:
        size: tokens a page.
        layer: index of the layer in the model.
        first_head: see `PageView`.
        held: pages that a row holds, the most of any.
        high: high-water mark: places from it on were never used.
        outside: pages of a row that do not count against the budget, the most of any.
        keys: `[batch, kv_heads, N, head_dim]`.
        values: `[batch, kv_heads, N, value_dim]`.
        slots: the column of the token in each place, -1 where there is none; int32
            `[batch, kv_heads, N]`.
        start: see `PageView`; of C pages, and so are the next five.
        stamp: see `PageView`.
        sums: see `PageView`.
        pinned: see `PageView`.
        kmin: see `PageView`; None where the policy needs no summaries.
        kmax: see `PageView`; None where the policy needs no summaries.
        current: place of each row's newest page, int64 `[batch, kv_heads]`.
        queries: see `keep_last`; of length 0 where the policy needs no window.
        asked: see `keep_last`.
    """

    size: int
    layer: int
    first_head: int
    held: int
    high: int
    outside: int
    keys: Tensor
    values: Tensor
    slots: Tensor
    start: Tensor
    stamp: Tensor
    sums: Tensor
    pinned: Tensor
    kmin: Tensor | None
    kmax: Tensor | None
    current: Tensor
    queries: Tensor
    asked: Tensor

    @classmethod
    def empty(
        cls, policy: Policy, layer: int, first_head: int, query: Tensor, key: Tensor, value: Tensor
    ) -> "PagePool":
        """A pool without a place, of the batch, heads, dtypes and device of these tensors.

        Args:
            policy: of the layer.
            layer: index of the layer in the model.
            first_head: see `PageView`.
            query: `[batch, query_heads, any, head_dim]`.
            key: `[batch, kv_heads, any, head_dim]`.
            value: `[batch, kv_heads, any, value_dim]`.
        """
        (batch, heads), needs = key.shape[:2], policy.needs
        none = torch.zeros(batch, heads, 0, dtype=torch.int32, device=key.device)
        dtype = torch.promote_types(key.dtype, torch.float32)
        bounds = key.new_zeros(batch, heads, 0, key.shape[-1]) if needs.summaries else None
        return cls(
            size=policy.page_size,
            layer=layer,
            first_head=first_head,
            held=0,
            high=0,
            outside=0,
            keys=key.new_zeros(batch, heads, 0, key.shape[-1]),
            values=value.new_zeros(batch, heads, 0, value.shape[-1]),
            slots=none,
            start=none,
            stamp=none,
            sums=key.new_zeros(batch, heads, 0, needs.sums, dtype=dtype),
            pinned=none.bool(),
            kmin=bounds,
            kmax=bounds,
            current=none.sum(-1),
            queries=query.new_zeros(batch, query.shape[1], needs.window, query.shape[-1]),
            asked=none.new_full((batch, needs.window), -1, dtype=torch.int64),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the pool, by name."""
        return {name: v for name, v in vars(self).items() if isinstance(v, Tensor)}

    def is_like(self, other: "PagePool") -> bool:
        """Whether both are of one batch, and their keys and values of one kind."""

        def kind(held: Tensor) -> tuple[object, ...]:
            return (*held.shape[:2], held.shape[3], held.dtype, held.device)

        return [kind(self.keys), kind(self.values)] == [kind(other.keys), kind(other.values)]

    def map(self, change: Callable[[Tensor], Tensor]) -> "PagePool":
        """The pool with `change` applied to every tensor; dimension 0 of each is the batch."""
        changed: dict[str, Any] = {name: change(v) for name, v in self.tensors().items()}
        return replace(self, **changed)

    def view(self, now: Tensor, weights: Tensor | None = None) -> PageView:
        """The places below the high-water mark, as a policy sees them.

        Args:
            now: rank of each row's newest token, int64 `[batch]`.
            weights: see `PageView`.
        """
        pages, tokens = self.high, self.high * self.size
        whole = pages == self.start.shape[-1]  # then nothing is to be cut off
        kmin, kmax = self.kmin, self.kmax
        return PageView(
            start=self.start if whole else self.start[..., :pages],
            stamp=self.stamp if whole else self.stamp[..., :pages],
            sums=self.sums if whole else self.sums[:, :, :pages],
            pinned=self.pinned if whole else self.pinned[..., :pages],
            filled=(self.slots if whole else self.slots[..., :tokens]) >= 0,
            kmin=kmin if whole or kmin is None else kmin[:, :, :pages],
            kmax=kmax if whole or kmax is None else kmax[:, :, :pages],
            keys=self.keys if whole else self.keys[:, :, :tokens],
            values=self.values if whole else self.values[:, :, :tokens],
            weights=weights,
            window=None,
            now=now[:, None, None],
            page_size=self.size,
            layer=self.layer,
            first_head=self.first_head,
        )

    def mark(self, pages: PageView, before: PageView) -> None:
        """Store the stamps and sums that a policy has set.

        Args:
            pages: with those set.
            before: what the policy was shown, of `view`.
        """
        if pages.stamp is not before.stamp:
            before.stamp.copy_(pages.stamp)
        if pages.sums is not before.sums:
            before.sums.copy_(pages.sums)

    def write(self, key: Tensor, value: Tensor, step: Step, policy: Policy, weigh: Weigh) -> None:
        """Write one token for each row, in place; evict pages first where there is no room.

        Args:
            key: `[batch, kv_heads, 1, head_dim]`.
            value: `[batch, kv_heads, 1, value_dim]`.
            step: the forward.
            policy: the one that evicts while decoding.
            weigh: the layer's own attention weights.
        """
        batch, heads = self.current.shape
        b = torch.arange(batch, device=key.device)[:, None]
        h = torch.arange(heads, device=key.device)[None]
        opens = step.before % self.size == 0
        if step.valid is not None:
            opens = opens & step.valid[:, -1]
        opens = opens[:, None]
        may_open = step.then.ragged or step.longest_before % self.size == 0
        if may_open and opens.device.type == "cpu":  # nothing to wait for
            may_open = bool(opens.any())
        if may_open:
            self._open(opens, b, h, step, policy, weigh)
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

    def rebuilt(self, new: SeveralTokens, policy: Policy) -> "PagePool":
        """The pool after a forward of several tokens; shares no memory with this one.

        The old and the new tokens are laid out in pages, the policy observes the forward, and only
        then the pages that are over its budget are pruned.

        Args:
            new: what the forward brings.
            policy: of the layer; its `page_size` is this pool's.
        """
        layout = lay_out(self.view(new.step.after - 1), new, policy)
        pages = observe(policy, layout.pages, new.newest, new.scaling, new.step.goes_on)
        queries, asked = keep_last(self.queries, self.asked, new.query, new.step)
        keep, pinned = prune(layout, pages, new, policy, queries, asked)
        if new.step.then.ragged or self.start.shape[-1]:
            held = int(keep.sum(-1).max())
            outside = 0 if policy.pins_count else int((pinned & keep).sum(-1).max())
        else:
            held, outside = left_of_a_prompt(policy, keep.shape[-1])
        kept, is_page = kept_places(pages.start, keep, held)
        source = take_pages(layout.source, kept, self.size)
        filled = take_pages(pages.filled, kept, self.size) & is_page.repeat_interleave(
            self.size, -1
        )
        return PagePool(
            size=self.size,
            layer=self.layer,
            first_head=self.first_head,
            held=held,
            high=held,
            outside=outside,
            keys=take_tokens(new.keys, source),
            values=take_tokens(new.values, source),
            slots=new.slots.gather(-1, source).masked_fill(~filled, -1),
            start=pages.start.gather(-1, kept).masked_fill(~is_page, -1),
            stamp=pages.stamp.gather(-1, kept),
            sums=take_tokens(pages.sums, kept),
            pinned=pinned.gather(-1, kept) & is_page,
            kmin=None if pages.kmin is None else take_tokens(pages.kmin, kept),
            kmax=None if pages.kmax is None else take_tokens(pages.kmax, kept),
            current=is_page.sum(-1).clamp(min=1) - 1,  # oldest first: the newest is last
            queries=queries,
            asked=asked,
        )

    def _open(
        self, opens: Tensor, b: Tensor, h: Tensor, step: Step, policy: Policy, weigh: Weigh
    ) -> None:
        """Give an empty page to the rows of `opens`, bool `[batch, 1]`."""
        self.make_room(opens, step, policy, weigh)
        free = (self.start[..., : self.high] < 0).to(torch.int8).argmax(-1)  # the first one
        self.current = torch.where(opens, free, self.current)
        page = self.current
        rank = step.before[:, None].to(torch.int32).expand_as(page)
        self.start[b, h, page] = torch.where(opens, rank, self.start[b, h, page])
        self.stamp[b, h, page] = torch.where(opens, rank, self.stamp[b, h, page])
        self.sums[b, h, page] = self.sums[b, h, page].masked_fill(opens[..., None], 0)
        self.pinned[b, h, page] = self.pinned[b, h, page] & ~opens

    def make_room(self, opens: Tensor, step: Step, policy: Policy, weigh: Weigh) -> None:
        """Evict pages and allocate places, so that rows of `opens` have a free one below `high`.

        Args:
            opens: bool `[batch or 1, 1]`, True for rows that need one.
            step: the forward.
            policy: the one that evicts while decoding.
            weigh: the layer's own attention weights.
        """
        most = policy.pages_held
        ragged = step.then.ragged  # then some rows may be full before others
        if most is not None and self.held - (0 if ragged else self.outside) >= most:
            self._evict(opens[..., None], step, policy, most, weigh)
        bounds = [self.held + 1, -(-step.longest_after // self.size)]
        self.held = min(bounds if most is None else [*bounds, most + self.outside])
        self._grow(self.held, None if most is None else most + self.outside)
        self.high = max(self.high, self.held)

    def _evict(self, opens: Tensor, step: Step, policy: Policy, most: int, weigh: Weigh) -> None:
        """Free places in those rows of `opens`, bool `[batch, 1, 1]`, that hold `most` pages."""
        kept, pages = policy.pages_kept, self.view(step.before)
        assert kept is not None
        used, surplus = pages.used, most - kept + 1
        counted = used if policy.pins_count else used & ~pages.pinned
        full = counted.sum(-1, keepdim=True) >= most
        unused = (~used).sum(-1, keepdim=True)
        order = eviction_order(policy, pages, pages.pinned, self.queries, self.asked, weigh)
        gone = used & (order < unused + surplus) & full & opens
        self.start[..., : self.high].masked_fill_(gone, -1)
        self.slots.unflatten(-1, (-1, self.size))[:, :, : self.high].masked_fill_(
            gone[..., None], -1
        )
        if not step.then.ragged:
            self.held -= surplus
        elif surplus > 1:  # or the next step would try again; a wait for the device now and then
            self.held = int((self.start[..., : self.high] >= 0).sum(-1).max())

    def _grow(self, pages: int, most: int | None) -> None:
        """Allocate places for a row of `pages` pages, and some more, so that it happens rarely.

        Args:
            pages: held by a row from now on.
            most: pages that a row will ever hold while decoding; None for no bound.
        """
        have = self.start.shape[-1]
        if pages <= have:
            return
        more = max(pages - have, -(-LEAST // self.size), have // SHARE)
        if most is not None:
            more = max(pages, min(have + more, most)) - have

        def longer(old: Tensor, places: int, empty: int) -> Tensor:
            shape = (*old.shape[:2], places, *old.shape[3:])
            return torch.cat([old, old.new_full(shape, empty)], dim=2)

        self.keys = longer(self.keys, more * self.size, 0)
        self.values = longer(self.values, more * self.size, 0)
        self.slots = longer(self.slots, more * self.size, -1)
        self.start = longer(self.start, more, -1)
        self.stamp = longer(self.stamp, more, -1)
        self.sums = longer(self.sums, more, 0)
        self.pinned = longer(self.pinned, more, 0)
        if self.kmin is not None and self.kmax is not None:
            self.kmin, self.kmax = longer(self.kmin, more, 0), longer(self.kmax, more, 0)
