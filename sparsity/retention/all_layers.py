"""One cache across all of its layers: checks a forward, plans it, and closes it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsity.errors import SparsityError
from sparsity.policies import Full
from sparsity.policies.base import Policy
from sparsity.retention.batch_rows import BatchRows, Step, check_columns, check_room, plan
from sparsity.retention.clock import Clock
from sparsity.retention.fixed_pool import (
    evicts_between_steps,
    make_room,
    rehearse,
    steps_left,
)
from sparsity.retention.layer import LayerRetention
from sparsity.retention.one_at_a_time import OneAtATime
from sparsity.retention.seen_tokens import SeenTokens


class AllLayers:
    """The managed layers of one cache, and what they have in common; knows nothing of transformers.

    Attributes:
        policy: of the cache.
        planned: the policy by whose pins a forward is planned: that of the cache, or `Full` where
            all managed layers are dense.
        retentions: the managed layers, by their index in the model.
        rows: which columns of the batch are real tokens, after the last forward.
        tokens: the token ids seen.
        turn: the thread that is in a forward.
        step: the forward under way; None between forwards.
        repeats: how often the forward repeats each row held, before it changes anything else; 0
            once that is done.
        new_ids: token ids of the forward under way; None where there are none.
        reached: indices of the managed layers that the forward has reached so far.
        decoding: whether the last forward brought one token.
        max_tokens: columns that a text may have; None for no bound.
        clock: where the rows are in pools of fixed size; None while there are none.
        spare_clock: becomes the clock where it fits, so that it stays where it is in memory.
        armed: whether the next forward is a step of `LayerRetention.decode`, checked beforehand.
        begun: whether that step is under way.
        unfinished: whether such a step has failed.
        behind: whether such steps have moved on the clock, and not `rows`.
        compiled: whether the last of them ran in a graph of torch.compile.
        recorded: whether any did, with the memory that there is.
        peak_bytes: see `Report`.
    """

    def __init__(
        self, policy: Policy, retentions: dict[int, LayerRetention], rows: BatchRows
    ) -> None:
        own = [layer for layer, retention in retentions.items() if not retention.window]
        decides = any(layer >= policy.dense_layers for layer in own)
        self.policy = policy
        self.planned = policy if decides else Full(page_size=policy.page_size)
        self.retentions = retentions
        self.rows = rows
        self.tokens = SeenTokens()
        self.turn = OneAtATime()
        self.step: Step | None = None
        self.repeats = 0
        self.new_ids: Tensor | None = None
        self.reached: set[int] = set()
        self.decoding = False
        self.max_tokens: int | None = None
        self.clock: Clock | None = None
        self.spare_clock: Clock | None = None
        self.armed, self.behind, self.compiled = False, False, False
        self.begun, self.unfinished = False, False
        self.recorded = False
        self.peak_bytes = 0
        self._due: int | None = None  # column before which room must be made
        self._armed_at = 0  # column of the step that was armed last

    @property
    def fixed(self) -> bool:
        """Whether all managed layers decode in pools of fixed size."""
        places = [retention.places for retention in self.retentions.values()]
        return bool(places) and None not in places

    def arm(self, column: int) -> None:
        """Check a step of decoding that `LayerRetention.decode` will do, and make room for it.

        Nothing waits for the device, unless room is made.

        Args:
            column: of the new token, which is real in every row.

        Raises:
            SparsityError: where the token has no place.
        """
        self.turn.enter(self.busy)
        self.disarm()
        self._check_finished()
        self._check_length(column + 1)
        check_room(self.rows, self.planned, column)
        self._make_room(column)
        self.armed, self._armed_at = True, column

    @property
    def busy(self) -> bool:
        """Whether a forward is under way, or a step is armed."""
        return self.step is not None or self.armed

    def disarm(self) -> None:
        """Forget a step that was armed and did not run; one that ran in part is unfinished."""
        if self.armed and self.clock is not None and int(self.clock.column) != self._armed_at:
            self.unfinished = True
        self.armed = False

    def rehearse(self) -> None:
        """Build the kernels of a step, of one layer for each policy."""
        assert self.clock is not None
        for retention in {x.policy: x for x in self.retentions.values()}.values():
            assert retention.pool is not None
            rehearse(retention.pool, retention.policy, self.clock, **retention.score_arguments)

    def step_begins(self) -> None:
        """Start a step of `LayerRetention.decode`."""
        if self.begun:
            self.unfinished = True
            self._check_finished()
        self.begun = True

    def stepped(self) -> None:
        """End a step of `LayerRetention.decode`."""
        assert self.clock is not None
        self.clock.advance()
        self.armed, self.begun, self.behind, self.decoding = False, False, True, True
        self.compiled = torch.compiler.is_compiling()
        if self.compiled:
            self.recorded = True

    def catch_up(self) -> None:
        """Bring `rows` to where the clock is; waits for the device."""
        if self.behind:
            assert self.clock is not None
            self.rows = self.rows.moved_on(self.clock.rank.clone(), int(self.clock.column))
            self.behind = False

    def _check_finished(self) -> None:
        if self.step is not None or self.unfinished or self.begun:
            raise SparsityError(
                "the last forward with this SparseCache did not finish, so what it holds is "
                "incomplete; call cache.reset() and start from the prompt"
            )

    def _check_length(self, columns: int) -> None:
        if self.max_tokens is not None and columns > self.max_tokens:
            raise SparsityError(
                f"max_tokens={self.max_tokens}, and this forward makes {columns} tokens (padding "
                f"included): make the cache with max_tokens={columns} or more"
            )

    def _make_room(self, column: int) -> None:
        """Evict where that is done between steps, before the token of `column` comes."""
        if self._due is None or column < self._due:
            return
        assert self.clock is not None
        for retention in self.retentions.values():
            if evicts_between_steps(retention.policy):
                assert retention.pool is not None
                assert retention.weigh is not None
                make_room(retention.pool, retention.policy, self.clock, retention.weigh)
        self._note_due(column)

    def _note_due(self, column: int) -> None:
        """Note when `_make_room` is due next; `column` is the next one."""
        assert self.clock is not None
        left = [
            steps_left(retention.pool, retention.policy, self.clock)
            for retention in self.retentions.values()
            if retention.pool is not None and evicts_between_steps(retention.policy)
        ]
        self._due = column + max(0, int(torch.stack(left).min())) if left else None

    def plan(self, arguments: dict[str, Any]) -> tuple[Step, int]:
        """What a forward of the decoder does to the batch; changes nothing.

        Args:
            arguments: those that the decoder is called with, by name.

        Returns:
            The forward, and how often each row held must be repeated before it.

        Raises:
            SparsityError: for a forward that does not go on from what is held.
        """
        self._check_finished()
        self.catch_up()
        tokens = arguments.get("input_ids")
        tokens = arguments["inputs_embeds"] if tokens is None else tokens
        batch, queries = tokens.shape[:2]
        rows, mask = self.rows, arguments.get("attention_mask")
        ids, positions = arguments.get("input_ids"), arguments.get("position_ids")
        if queries > 1 and ids is not None and mask is None and positions is None:
            self.tokens.check_not_again(ids, rows.seen)
        checked = queries > 1 or not self.decoding  # while decoding, never wait for the device
        check_columns(rows.seen, queries, mask, positions if checked else None)
        have = rows.batch or batch
        if batch % have:
            raise SparsityError(
                f"this SparseCache holds {have} rows and the model was called with {batch}; use "
                "cache.batch_select_indices(...) to keep some of the rows, cache.reset(), or a new "
                "SparseCache"
            )
        if batch > have:  # beams or samples of a row, or prompts that share it
            rows = rows.take(torch.arange(have).repeat_interleave(batch // have))
        self._check_length(rows.seen + queries)
        step = plan(rows, self.planned, batch, queries, mask, tokens.device)
        self._check_windows(step)
        return step, batch // have

    def _check_windows(self, step: Step) -> None:
        """Refuse padding amid a row where windows are kept: they are counted in real tokens."""
        if step.valid is None or not any(x.window for x in self.retentions.values()):
            return
        begun = (step.before[:, None] > 0) | (step.valid.cumsum(1) > 0)
        if bool((begun & ~step.valid).any()):
            raise SparsityError(
                "padding amid a row, and this model has layers with sliding windows, which count "
                "padding: make the cache with static=False, or pad on the left"
            )

    def open(self, step: Step, repeats: int, new_ids: Tensor | None) -> None:
        """Start a planned forward.

        Args:
            step: the forward.
            repeats: how often each row held is repeated before it.
            new_ids: its token ids, int64 `[batch, tokens]`; None where there are none.
        """
        self.step, self.repeats, self.new_ids, self.reached = step, repeats, new_ids, set()
        self.armed = False
        if step.single and self.clock is not None:
            if repeats > 1:
                self.clock = Clock.at(self.clock.rank.repeat_interleave(repeats), step.stop - 1)
            self.clock.expect(None if step.valid is None else step.valid[:, -1])
            self._make_room(step.stop - 1)

    def withdraw(self) -> None:
        """Undo `open`, for a forward that is refused before it has changed anything."""
        self.step, self.repeats, self.new_ids = None, 0, None
        self.abandon()

    def abandon(self) -> None:
        """End a forward that failed; if it was started, `step` stays, so the next is refused."""
        self.tokens.drop_handed()
        self.turn.leave()
        self.unfinished, self.armed = self.unfinished or self.begun, False

    def missed(self) -> list[int]:
        """Indices of the managed layers that this forward did not reach."""
        return sorted(set(self.retentions) - self.reached)

    def close(self, other_bytes: Callable[[], int]) -> None:
        """End the forward, and measure what is held.

        Args:
            other_bytes: counts the bytes held by layers that are not managed.
        """
        assert self.step is not None
        self.tokens.feed(self.new_ids, self.rows.seen, self.step.stop)
        self.new_ids = None
        self.turn.leave()
        single = self.step.single
        self.rows, self.decoding, self.step = self.step.then, single, None
        if self.fixed:
            self._set_clock(single)
        self.measure(other_bytes)

    def _set_clock(self, single: bool) -> None:
        """Move the clock to `rows`."""
        assert self.rows.real is not None
        self.clock, self.spare_clock = self.clock or self.spare_clock, None
        if self.clock is None or not self.clock.fits(self.rows.real):
            self.clock = Clock.at(self.rows.real, self.rows.seen)
        else:
            self.clock.set(self.rows.real, self.rows.seen)
        self.compiled = False
        if not single or self._due is None:
            self._note_due(self.rows.seen)

    def measure(self, other_bytes: Callable[[], int]) -> None:
        """Raise the peak to what is held, where more was allocated since this was last called.

        Args:
            other_bytes: counts the bytes held by layers that are not managed.
        """
        managed = self.retentions.values()
        if any(retention.reallocated for retention in managed):
            held = other_bytes() + sum(retention.num_bytes for retention in managed)
            extra = max(retention.transient_bytes for retention in managed)
            self.peak_bytes = max(self.peak_bytes, held + extra)
            for retention in managed:
                retention.reallocated, retention.transient_bytes = False, 0

    def kept(self, layer: int) -> tuple[int, int]:
        """Tokens kept by a managed layer (the most of any row and head) and evicted (in all)."""
        retention = self.retentions[layer]
        if retention.pool is None or self.rows.real is None:
            return (0 if retention.past is None else retention.past[0].shape[2]), 0
        tokens = (retention.pool.slots >= 0).sum(-1)
        seen = int(self.rows.real.sum()) * tokens.shape[1]
        return int(tokens.max()), seen - int(tokens.sum())

    @property
    def prompt_attention(self) -> str:
        """See `Report`."""
        used = (self.retentions[layer].prompt_attention for layer in sorted(self.retentions))
        return ", ".join(dict.fromkeys(name for name in used if name))

    def take(self, index: Tensor) -> None:
        """Keep the rows of `index`, in that order; the layers' tensors are not changed here."""
        self.catch_up()
        self.rows = self.rows.take(index)
        self.tokens.take(index)
        if self.clock is not None:
            self._set_clock(single=True)
            if self.step is not None and self.step.single and self.step.valid is not None:
                self.clock.expect(self.step.valid[:, -1])

    def clear(self) -> None:
        """As new; the layers' tensors are not changed here."""
        self.rows, self.step, self.decoding, self.peak_bytes = BatchRows(), None, False, 0
        self.tokens, self.turn, self.new_ids = SeenTokens(), OneAtATime(), None
        self.armed, self.behind, self.compiled, self._due = False, False, False, None
        self.begun, self.unfinished = False, False
