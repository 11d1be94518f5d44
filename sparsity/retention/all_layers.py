"""The state of one cache across its layers: checks a forward, plans it, closes it."""

from typing import Any

import torch
from torch import Tensor

from sparsity.errors import SparsityError
from sparsity.policies import Full
from sparsity.policies.base import Policy
from sparsity.retention.batch_rows import BatchRows, Step, check_columns, plan
from sparsity.retention.layer import LayerRetention
from sparsity.retention.one_at_a_time import OneAtATime
from sparsity.retention.seen_tokens import SeenTokens


class AllLayers:
    """Everything a cache knows beyond its layers' tensors; nothing here is about transformers.

    policy: of the cache. retentions: the managed layers by their index in the model. rows: where
    the batch stands. tokens: the ids seen. turn: the thread that is in a forward. step: the forward
    under way, None between forwards. repeats: how often it repeats each row held, before anything
    else is changed; 0 once that is done. peak_bytes: most bytes held at once, see `Report`.
    """

    def __init__(
        self, policy: Policy, retentions: dict[int, LayerRetention], rows: BatchRows
    ) -> None:
        decides = any(layer >= policy.dense_layers for layer in retentions)
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
        self.peak_bytes = 0

    def plan(self, arguments: dict[str, Any]) -> tuple[Step, int]:
        """What a forward of the decoder with these arguments does, and nothing done yet.

        The number says how often each row held must be repeated first. Raises SparsityError.
        """
        if self.step is not None:
            raise SparsityError(
                "the last forward with this SparseCache did not finish, so what it holds is "
                "incomplete; call cache.reset() and start from the prompt"
            )
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
        return plan(rows, self.planned, batch, queries, mask, tokens.device), batch // have

    def open(self, step: Step, repeats: int, new_ids: Tensor | None) -> None:
        """Start the planned forward."""
        self.step, self.repeats, self.new_ids, self.reached = step, repeats, new_ids, set()

    def withdraw(self) -> None:
        """The forward is refused before it has changed anything: as if it had not been started."""
        self.step, self.repeats, self.new_ids = None, 0, None
        self.abandon()

    def abandon(self) -> None:
        """The forward, or the attempt at one, is over; `step` stays if it has changed something."""
        self.tokens.drop_handed()
        self.turn.leave()

    def missed(self) -> list[int]:
        """Managed layers that this forward did not reach."""
        return sorted(set(self.retentions) - self.reached)

    def close(self, other_bytes: int) -> None:
        """End the forward. other_bytes: held by layers that are not managed."""
        assert self.step is not None
        self.tokens.feed(self.new_ids, self.rows.seen, self.step.stop)
        self.new_ids = None
        self.turn.leave()
        self.rows, self.decoding, self.step = self.step.then, self.step.single, None
        managed = self.retentions.values()
        if any(retention.reallocated for retention in managed):
            held = other_bytes + sum(retention.num_bytes for retention in managed)
            extra = max(retention.transient_bytes for retention in managed)
            self.peak_bytes = max(self.peak_bytes, held + extra)
            for retention in managed:
                retention.reallocated, retention.transient_bytes = False, 0

    def kept(self, layer: int) -> tuple[int, int]:
        """Tokens kept (the most of any row and head) and dropped (in all) by a managed layer."""
        retention = self.retentions[layer]
        if retention.pool is None or self.rows.real is None:
            return (0 if retention.past is None else retention.past[0].shape[2]), 0
        tokens = (retention.pool.slots >= 0).sum(-1)
        seen = int(self.rows.real.sum()) * tokens.shape[1]
        return int(tokens.max()), seen - int(tokens.sum())

    def take(self, index: Tensor) -> None:
        """Keep the rows of `index` in that order; the layers are told on their own."""
        self.rows = self.rows.take(index)
        self.tokens.take(index)

    def clear(self) -> None:
        """As new; the layers are told on their own."""
        self.rows, self.step, self.decoding, self.peak_bytes = BatchRows(), None, False, 0
        self.tokens, self.turn, self.new_ids = SeenTokens(), OneAtATime(), None
