"""One layer under one policy: what it holds, and attention over it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsity.policies.base import Policy
from sparsity.retention.attention import (
    PromptAttention,
    attend,
    attend_and_weigh,
    attention_weights,
)
from sparsity.retention.batch_rows import Step
from sparsity.retention.clock import Clock, frozen, keep_address
from sparsity.retention.eviction import observe
from sparsity.retention.fixed_pool import decode, fix
from sparsity.retention.lazy_mask import LazyMask
from sparsity.retention.one_token import write
from sparsity.retention.page_pool import PagePool
from sparsity.retention.query_weights import (
    OF_AT_LEAST,
    Weigh,
    forward_weights,
    keep_newest,
    on_first,
)
from sparsity.retention.rotation import Move, Rotation
from sparsity.retention.several_tokens import SeveralTokens


class LayerRetention:
    """What one layer holds under its policy, and attention over it.

    Attributes:
        policy: decides which tokens are kept.
        needs: of the policy.
        layer: index of the layer in the model.
        first_head: see `PageView`.
        move: rotates keys to other positions, for a policy that needs it.
        pool: the tokens held; None before the first forward.
        window: whether the policy is the model's own, a sliding window.
        weigh: its attention weights, as of the last forward of several tokens; None before one.
        places: places for pages of a pool that never grows, see `sparsity.retention.fixed_pool`;
            None for one that grows.
        fixed: `pool` where it has `places`, which `clear` leaves; the next prompt goes there.
        past: keys and values `[batch, kv_heads, tokens, head_dim]` of another cache, which the
            first forward takes in (only then is it known which columns are padding); never written
            to.
        past_bytes: bytes of `past` as it was handed over; 0 without one.
        borrowed: whether `past` still is the other cache's own tensors, and not copies of rows.
        reallocated: whether more was allocated since this was last set to False.
        transient_bytes: bytes of keys and values that were in memory besides while it was: of
            several tokens before they were pruned, of fewer places or rows before they were more.
        prompt_attention: what computed the last forward of several tokens, see `Report`.
        asked_for_sinks: whether a forward of several tokens is to measure `on_first`.
        on_first: see `query_weights.on_first`; None where it was not measured.
    """

    def __init__(
        self, policy: Policy, layer: int, past: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.policy = policy
        self.needs = policy.needs
        self.layer = layer
        self.first_head = 0
        self.move: Move | None = None
        self.pool: PagePool | None = None
        self.window = False
        self.places: int | None = None
        self._selects = type(policy).select is not Policy.select
        self._observes = type(policy).observe is not Policy.observe
        self.past = past
        self.past_bytes = storage_bytes(list(past or ()))
        self.borrowed = past is not None
        self.reallocated = False
        self.transient_bytes = 0
        self.weigh: Weigh | None = None
        self.fixed: PagePool | None = None
        self.prompt_attention = ""
        self.asked_for_sinks = False
        self.on_first: Tensor | None = None

    @property
    def score_arguments(self) -> dict[str, Any]:
        """`scaling`, `softcap` and `sinks` of the last forward of several tokens."""
        assert isinstance(self.weigh, partial)
        return dict(self.weigh.keywords)

    @property
    def held(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values held, unused places included; None when there are none."""
        if self.pool is not None:
            return self.pool.keys, self.pool.values
        return self.past

    @property
    def num_bytes(self) -> int:
        """Bytes of every tensor of its own, those that the policy needs included."""
        tensors = [] if self.borrowed else list(self.past or ())
        for pool in (self.pool, self.fixed):
            tensors += [] if pool is None else pool.tensors().values()
        return storage_bytes(tensors)

    def clear(self) -> None:
        """Forget everything; as new."""
        self.pool, self.past, self.weigh = None, None, None
        self.borrowed, self.past_bytes = False, 0
        self.reallocated, self.transient_bytes = False, 0
        self.prompt_attention = ""

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every tensor held; the first dimension of each is the batch."""
        before, borrowed = self.held, self.borrowed
        if self.pool is not None:
            self.pool = self.pool.map(change)
            if self.places is not None:
                self.fixed = self.pool
                keep_address(*self.pool.tensors().values())
        if self.past is not None:
            self.past = (change(self.past[0]), change(self.past[1]))
        if before is None or self.held is None:
            return
        if self.held[0] is not before[0]:
            self.borrowed = False
        if self.held[0].shape[0] > before[0].shape[0]:
            self._note_more(() if borrowed else before)

    def note_attended(self, slots: Tensor) -> None:
        """Called with the columns that a single new token attends to; does nothing here.

        A subclass may record them, as `replay` does.

        Args:
            slots: int32 `[batch, kv_heads, n]`, -1 for none.
        """

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        step: Step,
        mask: LazyMask,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        own: PromptAttention | None = None,
    ) -> Tensor:
        """Store the new tokens, attend, and let the policy observe and evict.

        A single token is stored first (in place of an evicted page when there is no room), and then
        attends to the pages that the policy selects. Several tokens attend to all that is held and
        all that is new, and only then is the pool pruned.

        Args:
            query: `[batch, query_heads, q, head_dim]`.
            key: of the q new tokens, `[batch, kv_heads, q, head_dim]`.
            value: of the q new tokens, `[batch, kv_heads, q, value_dim]`.
            step: the forward.
            mask: of the forward.
            scaling: factor on a query-key product before the softmax.
            softcap: see `sparsity.retention.attention.attend_reference`.
            sinks: see `sparsity.retention.attention.attend_reference`.
            own: the model's own attention, which computes what a prompt of several tokens attends
                to where nothing was held before it; None for ours.

        Returns:
            `[batch, q, query_heads, value_dim]`.
        """
        step = step.on(key.device)
        if step.single:
            return self._one(query, key, value, step, mask, scaling, softcap, sinks)
        return self._several(query, key, value, step, mask, scaling, softcap, sinks, own)

    def decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        clock: Clock,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`attend` for a single token in a pool of fixed size: tensor operations only.

        Args:
            query: `[batch, query_heads, 1, head_dim]`.
            key: of the new token, `[batch, kv_heads, 1, head_dim]`.
            value: of the new token, `[batch, kv_heads, 1, value_dim]`.
            clock: where the rows are.
            scaling: see `attend`.
            softcap: see `attend`.
            sinks: see `attend`.

        Returns:
            `[batch, 1, query_heads, value_dim]`.
        """
        pool, move = self.pool, self.move if self.needs.moved else None
        assert pool is not None
        return decode(pool, self.policy, clock, query, key, value, scaling, softcap, sinks, move)

    def _one(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        step: Step,
        mask: LazyMask,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """`attend` for a single token."""
        pool, policy = self.pool, self.policy
        assert pool is not None
        weigh = partial(attention_weights, scaling=scaling, softcap=softcap, sinks=sinks)
        keys, values = pool.keys, pool.values
        write(pool, key.detach(), value.detach(), step, policy.decoding, weigh)
        if pool.keys is not keys:
            self._note_more((keys, values))
        newest = query[:, :, -1].detach()
        now = step.before if step.alike else step.after - 1
        view = pool.view(now) if self._selects else None
        chosen = None if view is None else policy.select(newest, view)
        cut = False
        if chosen is None:
            tokens = pool.high * pool.size
            if (
                step.alike and self._in_order and self.needs.attention is None
            ):  # the newest page is the last, and not yet full
                tokens, cut = tokens - -step.longest_after % pool.size, True
            keys, values = pool.keys[:, :, :tokens], pool.values[:, :, :tokens]
            if self.needs.moved:
                keys = self._closed_up_alike(keys, step)
            slots = pool.slots[..., :tokens]
        else:
            keys, values = (
                _pages_of(pool.keys, chosen, pool.size),
                _pages_of(pool.values, chosen, pool.size),
            )
            slots = _pages_of(pool.slots[..., None], chosen, pool.size)[..., 0]
        self.note_attended(slots)
        allowed = None
        # Without a mask only where every place that is read holds a token.
        if not (cut or self._is_full(step)) or not mask.plain:
            allowed = self._allowed(slots, step, mask)
        weights = None
        if self._in_one_pass(chosen, values, step, mask):
            out, weights = attend_and_weigh(query, keys, values, allowed, weigh, self.needs.group)
        else:
            out = attend(query, keys, values, allowed, scaling, softcap=softcap, sinks=sinks)
        if self._observes:
            if self.needs.attention is not None and weights is None:
                tokens = pool.high * pool.size
                keys, held = pool.keys[:, :, :tokens], pool.slots[..., :tokens]
                weights = forward_weights(
                    query.detach(), newest, keys, held, step, mask, self.needs, weigh
                )
            if view is None:
                view = pool.view(now, weights)
            elif weights is not None:
                view = replace(view, weights=weights)
            observed = observe(policy, view, newest, scaling, step.goes_on)
            if observed is not view:
                pool.mark(observed, view)
        if self.needs.window:
            keep_newest(pool.queries, pool.asked, query.detach(), step)
        return out

    @property
    def _in_order(self) -> bool:
        """Whether pages lie oldest first, without a hole, where all rows are alike."""
        return self.places is None and self.policy.decoding.pages_held is None

    def _is_full(self, step: Step) -> bool:
        """Whether every place below the high-water mark holds a token, for all that is known."""
        pool = self.pool
        assert pool is not None
        full = step.alike and step.longest_after % pool.size == 0
        return full and pool.held == pool.high and self.places is None

    def _in_one_pass(
        self, chosen: Tensor | None, values: Tensor, step: Step, mask: LazyMask
    ) -> bool:
        """Whether the attention weights that the policy needs are those that give the output."""
        wide = values.dtype in (torch.float32, torch.float64)  # else a kernel rounds differently
        return (
            self.needs.attention is not None
            and chosen is None
            and step.alike
            and mask.plain
            and wide
        )

    def _allowed(self, slots: Tensor, step: Step, mask: LazyMask) -> Tensor:
        """Where a single new token attends to `slots`: bool `[batch, kv_heads, 1, n]`."""
        if step.alike and mask.plain:
            return (slots >= 0)[:, :, None]  # no token held is newer, none is padding
        columns = torch.arange(step.stop - 1, step.stop, device=slots.device)
        allowed = mask(columns, slots)
        if step.then.ragged:  # a row with nothing but padding so far: any value, but no NaN
            allowed = allowed | ~allowed.any(-1, keepdim=True)
        return allowed

    def _several(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        step: Step,
        mask: LazyMask,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
        own: PromptAttention | None,
    ) -> Tensor:
        """`attend` for several tokens, those of a `past` cache among them."""
        key, value, slots = self._joined(key, value, step)
        alone = self.pool is None and key.shape[2] == step.queries
        refused = _why_ours(own, alone, query, key, value)
        self.prompt_attention = f"sparsity ({refused})"
        if own is not None and not refused:
            self.prompt_attention = own.name
            out = own(query, key, value)
        else:
            plain = mask.rule is None and mask.padding is None and step.valid is None
            allowed = None
            if not (causal := plain and alone):
                columns = torch.arange(step.stop - step.queries, step.stop, device=key.device)
                allowed = mask(columns, slots)
            keys = key
            if self.needs.moved:
                keys = self._closed_up(key, step.before, step.longest_before)
            out = attend(query, keys, value, allowed, scaling, causal, softcap, sinks)
        weigh = partial(attention_weights, scaling=scaling, softcap=softcap, sinks=sinks)
        query, key, value = query.detach(), key.detach(), value.detach()
        newest, weights = _newest(query, step), None
        if self.needs.attention is not None:
            weights = forward_weights(query, newest, key, slots, step, mask, self.needs, weigh)
        pool = self.pool
        if self.asked_for_sinks and self._holds_all(step):
            self.on_first = on_first(newest, key, slots, step, weigh)
        if pool is None:
            pool = PagePool.empty(self.policy, self.layer, self.first_head, query, key, value)
        new = SeveralTokens(
            step=step,
            keys=key,
            values=value,
            slots=slots.expand(-1, key.shape[1], -1),
            query=query,
            newest=newest,
            weights=weights,
            scaling=scaling,
            weigh=weigh,
        )
        self.pool, self.weigh = pool.rebuilt(new, self.policy), weigh
        self.past, self.borrowed = None, False
        besides: tuple[Tensor, ...] = (key, value)
        if self.places is not None:
            besides = (*besides, *self.pool.tensors().values())
            fixed, self.fixed = self.fixed, None
            if fixed is not None and (frozen(fixed.keys) or not fixed.is_like(self.pool)):
                fixed = None  # of another batch, or of the model in another dtype
            self.pool = self.fixed = fix(self.pool, self.places, fixed)
        self._note_more(besides)
        return out

    def _holds_all(self, step: Step) -> bool:
        """Whether a text of `OF_AT_LEAST` tokens is here whole, for all that is known."""
        if step.longest_after < OF_AT_LEAST:
            return False
        kept = self.policy.pages_kept
        before = -(-step.longest_before // self.policy.page_size)
        return self.pool is None or kept is None or before <= kept

    def _note_more(self, besides: tuple[Tensor, ...]) -> None:
        """Note that more was allocated, and what keys and values were in memory besides."""
        self.reallocated, self.transient_bytes = True, sum(t.nbytes for t in besides)

    def _joined(self, key: Tensor, value: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and columns of all that is held, and then of all that is new.

        The columns are int32 `[batch, kv_heads or 1, n]`, -1 for none.
        """
        batch, heads = key.shape[:2]
        if self.past is not None:
            key = torch.cat([self.past[0].to(key.device), key], dim=2)
            value = torch.cat([self.past[1].to(value.device), value], dim=2)
        slots = torch.arange(step.first, step.stop, device=key.device, dtype=torch.int32)
        slots = slots.expand(batch, 1, -1)
        if step.valid is not None:
            slots = slots.masked_fill(~step.valid[:, None], -1)
        if (pool := self.pool) is not None:
            tokens = pool.high * pool.size
            key = torch.cat([pool.keys[:, :, :tokens], key], dim=2)
            value = torch.cat([pool.values[:, :, :tokens], value], dim=2)
            slots = torch.cat([pool.slots[..., :tokens], slots.expand(-1, heads, -1)], dim=2)
        return key, value, slots

    def _closed_up_alike(self, keys: Tensor, step: Step) -> Tensor:
        """`_closed_up` for a single new token; where rows are alike, layers share the angles."""
        pool, count, move = self.pool, self.needs.moved, self.move
        assert pool is not None
        alike = step.alike and self.places is None and pool.held >= count
        if not alike or not isinstance(move, Rotation):
            return self._closed_up(keys, step.after, step.longest_after)
        evicted = step.longest_after - pool.held
        if not evicted:
            return keys
        key = (move, count, evicted, keys.device)
        if key not in step.shared:
            old = torch.arange(count, device=keys.device)[None, None]
            step.shared[key] = move.turn(old, old + evicted, keys.device)
        moved = move.turned(keys[:, :, :count], *step.shared[key])
        return torch.cat([moved, keys[:, :, count:]], dim=2)

    def _closed_up(self, keys: Tensor, seen: Tensor, longest: int) -> Tensor:
        """The keys, the first `Needs.moved` of them rotated to stand right before the others held.

        Attention with rotary positions depends on the distance between query and key alone. The
        query is as far from the newest tokens in the text as inside the cache; from the first
        tokens it is further in the text, by the number of tokens evicted.

        Args:
            keys: `[batch, kv_heads, n, head_dim]`, from the pool's first place on. The first tokens
                lie there: pages are laid out oldest first, and a place is used again only once its
                page is evicted.
            seen: tokens of each row so far, `[batch]`.
            longest: upper bound of `seen`.
        """
        pool, count = self.pool, self.needs.moved
        if pool is None or longest <= (self.policy.budget or longest):
            return keys
        assert self.move is not None
        evicted = seen[:, None] - (pool.slots >= 0).sum(-1)
        rank = pool.start[..., :count].clamp(min=0).long()
        moved = self.move(keys[:, :, :count], rank, rank + evicted[..., None])
        return torch.cat([moved, keys[:, :, count:]], dim=2)


def _why_ours(
    own: PromptAttention | None, alone: bool, query: Tensor, key: Tensor, value: Tensor
) -> str:
    """Why the model's own attention does not compute a forward; empty where it does."""
    if not alone:
        return "tokens are held from before"
    if query.shape[2] == 1:
        return "a prompt of one token"
    return "the model's own is not known" if own is None else own.refused(query, key, value)


def _newest(query: Tensor, step: Step) -> Tensor:
    """The query of each row's newest real token, `[batch, query_heads, head_dim]`."""
    if step.valid is None or step.order is None:
        return query[:, :, -1]
    last = step.order.gather(1, (step.after - step.before - 1).clamp(min=0)[:, None])
    asked = (last - (step.stop - step.first - step.queries)).clamp(min=0)
    index = asked[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index)[:, :, 0]


def _pages_of(tokens: Tensor, pages: Tensor, size: int) -> Tensor:
    """`tokens` `[batch, kv_heads, P * size, d]` of the pages at `pages` `[batch, kv_heads, K]`."""
    if tokens.device.type == "cpu" and tokens.is_contiguous():  # a gather reads number by number
        paged = tokens.view(-1, size * tokens.shape[-1])
        first = torch.arange(0, len(paged), tokens.shape[2] // size).view(*pages.shape[:2], 1)
        taken = paged.index_select(0, (pages + first).view(-1))
        return taken.view(*pages.shape[:2], -1, tokens.shape[-1])
    paged = tokens.unflatten(2, (-1, size))
    index = pages[..., None, None].expand(-1, -1, -1, *paged.shape[3:])
    return paged.gather(2, index).flatten(2, 3)


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storage behind tensors, counted once where they share it."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())
