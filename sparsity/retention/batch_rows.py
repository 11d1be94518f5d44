"""Which columns of a padded batch are real tokens: the bookkeeping that all layers share.

A row is one sequence of the batch. A column is an index in the padded batch. A rank is the number
of a token among the real tokens of its row; the first is 0. Pages are counted by rank, so that a
padded row is treated as it would be alone.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from sparsity.errors import SparsityError
from sparsity.policies.base import Policy

FULL_PROMPT = (
    "Hand generate the full input_ids (and attention_mask) of the conversation, with at least one "
    "token more than the cache has seen: generate feeds a prompt that is cached whole once again "
    "from its start. Or call cache.reset()"
)


@dataclass(frozen=True)
class Pins:
    """The pinned tokens of each row; a page that holds one of them is pinned whole.

    Attributes:
        tokens: how many there are, int64 `[batch]`, as are the others.
        pages: pages that hold them.
        end: rank after the last of them.
        room: how many single tokens each row can take in before all its pages are pinned and full;
            the largest int64 while some page can still be evicted.
    """

    tokens: Tensor
    pages: Tensor
    end: Tensor
    room: Tensor

    @classmethod
    def none(cls, batch: int, device: torch.device) -> "Pins":
        """No pinned token in any of `batch` rows."""
        zero = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(zero, zero, zero, zero)

    def take(self, index: Tensor) -> "Pins":
        """The pins of the rows of `index`, in that order."""
        return Pins(*(getattr(self, f.name)[index] for f in fields(self)))

    def add(self, policy: Policy, before: Tensor, after: Tensor) -> "Pins":
        """Pin the tokens that a forward brings.

        Args:
            policy: whose budget the pinned pages count against.
            before: rank of each row's first new token, int64 `[batch]`.
            after: rank after its last, int64 `[batch]`.

        Raises:
            SparsityError: when that leaves nothing of the budget to decode with.
        """
        assert policy.budget is not None
        size, limit = policy.page_size, policy.budget // policy.page_size
        first, stop = before // size, -(-after // size)
        already = (self.end > first * size).to(torch.int64)  # the page that goes on may be pinned
        pages = self.pages + torch.where(after > before, stop - first - already, 0)
        tokens = self.tokens + after - before
        most, most_pages = int(tokens.max()), int(pages.max())
        if most >= policy.budget or most_pages > limit:
            name = type(policy).__name__
            raise SparsityError(
                f"{name}(budget={policy.budget}, page_size={size}) pins the prompt, and the prompt "
                f"has {most} tokens: nothing of the budget of {policy.budget} is left to decode "
                f"with. Raise the budget well above {max(most, most_pages * size)} tokens, or use "
                f"{name}(..., pin_prompt=False)"
            )
        room = torch.where(pages == limit, stop * size - after, torch.iinfo(torch.int64).max)
        return Pins(tokens, pages, torch.where(after > before, after, self.end), room)


@dataclass(frozen=True)
class BatchRows:
    """How far each row of the batch is, between two forwards.

    Attributes:
        batch: rows of the batch; None before the first forward.
        seen: columns so far.
        stored: columns that the layers have taken in; fewer than `seen` while a past cache waits
            for the first forward.
        real: real tokens of each row, int64 `[batch]`; None before the first forward.
        longest: upper bound of `real`.
        ragged: whether rows may differ in `real`.
        pins: the pinned tokens, for a policy whose pins count against its budget.
        room: single tokens that can come before all pages of some row are pinned and full; None
            while that is out of reach.
    """

    batch: int | None = None
    seen: int = 0
    stored: int = 0
    real: Tensor | None = None
    longest: int = 0
    ragged: bool = False
    pins: Pins | None = None
    room: int | None = None

    def take(self, index: Tensor) -> "BatchRows":
        """The rows of `index` (int64 numbers or a bool mask), in that order."""
        if self.batch is None:
            return self
        batch = int(index.sum()) if index.dtype == torch.bool else index.numel()
        if self.real is None:
            return replace(self, batch=batch)
        index = index.to(self.real.device)
        rows = replace(self, batch=batch, real=self.real[index])
        if self.pins is None:
            return rows
        pins, room = self.pins.take(index), self.room
        if room is not None:  # the row with the least room may be gone; the steps since remain
            left = int(pins.room.min()) - (int(self.pins.room.min()) - room)
            room = left if left < 2**31 else None
        return replace(rows, pins=pins, room=room)

    def moved_on(self, real: Tensor, seen: int) -> "BatchRows":
        """The rows after steps of one column, real in every row, up to the column `seen`.

        Args:
            real: real tokens of each row by then, int64 `[batch]`.
            seen: columns by then.
        """
        steps = seen - self.seen
        room = None if self.room is None else self.room - steps
        longest = self.longest + steps
        return replace(self, real=real, seen=seen, stored=seen, longest=longest, room=room)


@dataclass(frozen=True)
class Step:
    """One forward: which of its columns are real tokens, and what their ranks are.

    A column is an index in the padded batch, a rank an index among the real tokens of a row.

    Attributes:
        queries: columns that have a query: the last ones, all but those of a past cache.
        first: first new column.
        stop: column after the last; T = stop - first columns are new.
        valid: False for padding, bool `[batch, T]`; None when all new columns are real tokens.
        before: real tokens of each row before the forward: the rank of its first new one; int64
            `[batch]`.
        after: real tokens of each row after the forward, int64 `[batch]`.
        longest_before: upper bound of `before`, known without waiting for the device.
        longest_after: upper bound of `after`, known without waiting for the device.
        single: whether one column comes to a batch that holds tokens: a step of decoding.
        order: index among the new columns of each row's i-th new real token, int64 `[batch, T]`;
            None for a single column.
        then: the rows after the forward.
        shared: what one layer has computed and the others can use, by what it was computed for.
    """

    queries: int
    first: int
    stop: int
    valid: Tensor | None
    before: Tensor
    after: Tensor
    longest_before: int
    longest_after: int
    single: bool
    order: Tensor | None
    then: BatchRows
    shared: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def alike(self) -> bool:
        """Whether this is a single column of which every row has as many real tokens before it."""
        return self.single and not self.then.ragged

    @property
    def goes_on(self) -> Tensor | None:
        """Whether the forward brings a real token to each row, bool `[batch]`; None for to all."""
        return None if self.alike else self.after > self.before

    def on(self, device: torch.device) -> "Step":
        """The same step with its tensors on `device`."""
        if self.before.device == device:
            return self
        moved: dict[str, Tensor | None] = {
            name: None if value is None else value.to(device)
            for name, value in (
                ("valid", self.valid),
                ("before", self.before),
                ("after", self.after),
                ("order", self.order),
            )
        }
        return replace(self, **moved)  # type: ignore[arg-type]


def plan(
    rows: BatchRows,
    policy: Policy,
    batch: int,
    queries: int,
    mask: Tensor | None,
    device: torch.device,
) -> Step:
    """What a forward does to the rows; changes nothing.

    Args:
        rows: before the forward.
        policy: of the cache; may pin what several tokens bring.
        batch: rows of the forward.
        queries: its columns.
        mask: nonzero for real tokens, `[batch, seen + queries]`; None when all are real.
        device: of the forward.

    Raises:
        SparsityError: when the policy pins more than its budget holds.
    """
    first, stop = rows.stored, rows.seen + queries
    before = rows.real
    if before is None:
        before = torch.zeros(batch, dtype=torch.int64, device=device)
    single = stop - first == 1 and rows.longest > 0
    valid = None if mask is None else mask[:, first:stop].to(device=device, dtype=torch.bool)
    # While decoding, never wait for the device; on a CPU there is nothing to wait for.
    looks = not single or device.type == "cpu"
    if valid is not None and looks and bool(valid.all()):
        valid = None
    after = before + (stop - first if valid is None else valid.sum(-1))
    then = replace(rows, batch=batch, seen=stop, stored=stop, real=after)
    then = replace(then, ragged=rows.ragged or valid is not None)
    order = None
    if single:
        then = replace(then, longest=rows.longest + 1, room=_room_left(rows, policy))
    else:  # several tokens at once: waiting for the device is affordable
        longest = int(after.max()) if then.ragged else rows.longest + stop - first
        then = replace(then, longest=longest)
        order = torch.arange(stop - first, device=device).expand(batch, -1)
        if valid is not None:
            order = valid.logical_not().to(torch.int8).argsort(dim=-1, stable=True)
        if policy.pin_prompt and policy.pins_count and policy.pages_kept is not None:
            pins = (rows.pins or Pins.none(batch, device)).add(policy, before, after)
            room = int(pins.room.min())
            then = replace(then, pins=pins, room=room if room < policy.page_size else None)
    return Step(
        queries=queries,
        first=first,
        stop=stop,
        valid=valid,
        before=before,
        after=after,
        longest_before=rows.longest,
        longest_after=then.longest,
        single=single,
        order=order,
        then=then,
    )


def _room_left(rows: BatchRows, policy: Policy) -> int | None:
    """The room after one more token; SparsityError when there is none."""
    if rows.room is None:
        return None
    check_room(rows, policy, rows.seen)
    return rows.room - 1


def check_room(rows: BatchRows, policy: Policy, column: int) -> None:
    """Raise SparsityError where pinned pages leave no place for a single token.

    Args:
        rows: some steps before, or now.
        policy: of the cache.
        column: of the token.
    """
    if rows.room is not None and rows.room - (column - rows.seen) <= 0:
        name, budget = type(policy).__name__, policy.budget or 0
        raise SparsityError(
            f"{name}(budget={budget}, page_size={policy.page_size}): pinned pages fill the whole "
            f"budget of {budget} tokens, so the next token has no place. Raise the budget to at "
            f"least {budget + policy.page_size}, or use {name}(..., pin_prompt=False)"
        )


def check_columns(seen: int, queries: int, mask: object, positions: Tensor | None) -> None:
    """Refuse a forward that does not go on from the columns seen so far.

    Args:
        seen: columns so far.
        queries: columns of the forward.
        mask: what the model was given as `attention_mask`.
        positions: what it was given as `position_ids`; None to leave them unchecked.

    Raises:
        SparsityError: where the mask, or else the positions, say another number of columns.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise SparsityError(
            f"attention_mask is {shape}: with a SparseCache it must be the padding mask, "
            "[batch, tokens seen and new]"
        )
    expected = seen + queries
    given = None
    if isinstance(mask, Tensor):
        given = mask.shape[1]
    elif seen and queries and positions is not None and positions.dim() == 2:
        given = min(int(positions.max()) + 1, expected) if positions.numel() else 0
    if queries == 0:
        raise SparsityError(
            f"the cache has seen {seen} tokens, and the model is called with none that is new. "
            f"{FULL_PROMPT}"
        )
    if given is not None and given != expected:
        raise SparsityError(
            f"the cache has seen {seen} tokens and the model is called with {queries} more, but "
            f"the call is for {given} tokens in all. {FULL_PROMPT}"
        )
