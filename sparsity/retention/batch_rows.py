"""Which columns of a batch are real tokens: the bookkeeping that all layers share."""

from dataclasses import dataclass, fields, replace

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
    """Pinned tokens of each row; a page with one of them is pinned whole. int64 `[batch]` each.

    tokens: how many. pages: the pages they lie in. end: rank after the last of them.
    room: single tokens that each row can take in before all its pages are pinned and full; a very
    large number while some page can still be evicted.
    """

    tokens: Tensor
    pages: Tensor
    end: Tensor
    room: Tensor

    @classmethod
    def none(cls, batch: int, device: torch.device) -> "Pins":
        """Nothing is pinned."""
        zero = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(zero, zero, zero, zero)

    def take(self, index: Tensor) -> "Pins":
        """The rows of `index`, in that order."""
        return Pins(*(getattr(self, f.name)[index] for f in fields(self)))

    def add(self, policy: Policy, before: Tensor, after: Tensor) -> "Pins":
        """Pin the tokens of ranks `before` to `after` of each row (int64 `[batch]`).

        Raises SparsityError when that leaves nothing of the budget to decode with.
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
    """Where each row of the batch stands, between forwards.

    A column is a logical position of the padded batch; a rank counts a row's real tokens only.
    Everything about pages goes by rank, so a padded row behaves as it would alone.

    batch: rows; None before the first forward. seen: columns so far. stored: columns that the
    layers have taken in (fewer than `seen` while a past cache waits for the first forward).
    real: real tokens of each row, int64 `[batch]`. longest: upper bound of `real`. ragged: rows
    may differ. pins: what is pinned, where the policy pins. room: single tokens that fit before
    all pages of some row are pinned and full; None when that is out of reach.
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


@dataclass(frozen=True)
class Step:
    """One forward: where its tokens stand. T new columns, the last `queries` of them are asked.

    first, stop: the new columns. valid: bool `[batch, T]`, False for padding; None when all are
    real. before, after: real tokens of each row, int64 `[batch]`. longest_before, longest_after:
    their upper bounds. single: one new token onto what is stored; else several, and then order:
    among the new columns, the index of each row's i-th real token, int64 `[batch, T]`. then: the
    rows after this forward.
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
    """What a forward of `queries` columns does to `rows`; changes nothing.

    mask: nonzero for real tokens, `[batch, seen + queries]`, or None when all are real. Raises
    SparsityError when the policy pins more than its budget holds.
    """
    first, stop = rows.stored, rows.seen + queries
    before = rows.real
    if before is None:
        before = torch.zeros(batch, dtype=torch.int64, device=device)
    single = stop - first == 1 and rows.longest > 0
    valid = None if mask is None else mask[:, first:stop].to(device=device, dtype=torch.bool)
    if valid is not None and not single and bool(valid.all()):
        valid = None
    after = before + (stop - first if valid is None else valid.sum(-1))
    then = replace(rows, batch=batch, seen=stop, stored=stop, real=after)
    then = replace(then, ragged=rows.ragged or valid is not None)
    order = None
    if single:
        then = replace(then, longest=rows.longest + 1, room=_room_left(rows, policy))
    else:  # several tokens at once: looking at the device is affordable
        then = replace(then, longest=int(after.max()))
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
    if rows.room is None:
        return None
    if rows.room == 0:
        name, budget = type(policy).__name__, policy.budget or 0
        raise SparsityError(
            f"{name}(budget={budget}, page_size={policy.page_size}): pinned pages fill the whole "
            f"budget of {budget} tokens, so the next token has no place. Raise the budget to at "
            f"least {budget + policy.page_size}, or use {name}(..., pin_prompt=False)"
        )
    return rows.room - 1


def check_columns(seen: int, queries: int, mask: object, positions: Tensor | None) -> None:
    """Raise SparsityError unless the mask, or else the positions, go on from `seen` columns.

    mask: what the model was given as `attention_mask`. positions: `position_ids`, or None.
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
        given = min(int(positions.max()) + 1, expected)
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
