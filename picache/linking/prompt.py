"""A linked prompt as `generate` takes it: a batch of rows, padded on the left."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from picache.errors import PICacheError
from picache.hf.attention_functions import Attached
from picache.hf.held_kv import FirstTokens, HeldKV
from picache.kernels.queued import queued
from picache.linking.report import LinkReport, total
from picache.linking.row import LinkedRow
from picache.methods.base import LinkMethod

if TYPE_CHECKING:
    from picache.hf.arena import Arena
    from picache.hf.attention_switch import Attachment
    from picache.hf.linked_cache import LinkedCache
    from picache.hf.model import HFModel


class LinkedPrompt(Mapping[str, Any]):
    """Keyword arguments for ``model.generate(**prompt)``, which may be used any number of times.

    The keys are ``input_ids`` and ``attention_mask``, int64 ``[batch, tokens]``, padded on the
    left, and ``past_key_values``, a fresh cache at each access that holds every token but the last.
    A method that places chunks side by side adds ``position_ids``, int64 ``[batch, tokens]``.
    The first three are attributes too, as of a `BatchEncoding`.
    ``copy.deepcopy`` copies the tensors and stays on the same model.

    Attributes:
        logits: of the first new token, ``[batch, vocab_size]``.
        report: what linking did and what it cost; the sums over the rows of a batch.
        reports: the same, one for each row.
    """

    def __init__(
        self,
        inputs: dict[str, Tensor],
        held: "HeldKV",
        logits: Tensor,
        query_length: int,
        reports: tuple[LinkReport, ...],
        seconds: float,
        attach: "Attachment | None" = None,
    ) -> None:
        self._inputs, self._held, self._attach = inputs, held, attach
        self._query_length = query_length
        self.logits = logits
        self.reports = reports
        self.report = total(reports, seconds)

    def attached(self) -> AbstractContextManager[None]:
        """A context manager: inside its block the model decodes with the link method's attention.

        Only methods that change attention while decoding need it (`APE`); for others it does
        nothing. Inside the block the model serves this prompt alone.
        """
        return nullcontext() if self._attach is None else self._attach()

    @property
    def input_ids(self) -> Tensor:
        """Token ids, int64 ``[batch, tokens]``, padded on the left."""
        return self._inputs["input_ids"]

    @property
    def attention_mask(self) -> Tensor:
        """1 for tokens and 0 for padding, int64 ``[batch, tokens]``."""
        return self._inputs["attention_mask"]

    @property
    def past_key_values(self) -> "LinkedCache":
        """A fresh cache at each access that holds every token but the last."""
        from picache.hf.linked_cache import LinkedCache  # transformers is loaded with the model

        return LinkedCache(self._held, self._attach)

    @property
    def past_before_query(self) -> "LinkedCache":
        """A fresh cache at each access that holds the tokens in front of the query alone.

        For a cache that has to see the query itself: retention policies ask the last queries, of
        which a `past` has none. ``SparseCache(model, SnapKV(...), past=prompt.past_before_query)``
        and ``model.generate(prompt.input_ids, attention_mask=prompt.attention_mask,
        past_key_values=cache)`` compute the query anew, under the policy. Of a batch whose queries
        differ in length it holds what stands in front of the shortest one.
        """
        from picache.hf.linked_cache import LinkedCache

        tokens = self.input_ids.shape[1] - self._query_length
        return LinkedCache(FirstTokens(self._held, tokens), self._attach)

    def to(self, device: torch.device | str | int) -> "LinkedPrompt":
        """Move the tensors to a device, in place, and return the prompt, as `BatchEncoding.to`.

        Args:
            device: where to move them.

        Raises:
            PICacheError: when the method must be attached to the model (`APE`), whose tensors stay
                with it.
        """
        there = torch.empty(0, device=device).device
        if self._attach is not None and there != self.logits.device:
            raise PICacheError(
                f"this prompt's method is attached to the model while decoding (APE), on "
                f"{self.logits.device}: move the model, make a new PIC and link there"
            )
        self._inputs = {name: tensor.to(there) for name, tensor in self._inputs.items()}
        self._held = self._held.on(there)
        self.logits = self.logits.to(there)
        return self

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, name: str) -> Any:
        return self.past_key_values if name == "past_key_values" else self._inputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self._inputs, "past_key_values"))

    def __len__(self) -> int:
        return len(self._inputs) + 1

    def __repr__(self) -> str:
        batch, tokens = self._inputs["input_ids"].shape
        return f"LinkedPrompt(batch {batch}, {tokens} tokens)\n{self.report}"


def batched(
    model: "HFModel",
    rows: list[LinkedRow],
    method: LinkMethod,
    pad_id: int,
    arena: "Arena | None" = None,
) -> Callable[[tuple[LinkReport, ...], float], LinkedPrompt]:
    """Make one prompt of linked rows: padded on the left, the last token left for `generate`.

    It needs no result of the device, which may still be computing them.

    Args:
        model: the model the rows were linked with.
        rows: one linked prompt each.
        method: the method the rows were linked by.
        pad_id: token id of the padding.
        arena: where the rows that were linked lie, in whose turn this thread is; None elsewhere.

    Returns:
        The prompt, once it is given the report of each row and the seconds that linking took.
    """
    width, device = max(len(row.ids) for row in rows), model.device
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, width - len(row.ids) :] = row.ids
        mask[index, width - len(row.ids) :] = 1
    inputs = {"input_ids": queued(input_ids, device), "attention_mask": queued(mask, device)}
    attach = None
    if method.parallel is not None:
        inputs["position_ids"], state = _side_by_side(
            rows, method.parallel.lse_scale, width, device
        )
        attach = model.attention.attachment(state)
    if arena is not None:
        for index, row in enumerate(rows):
            if not row.in_places:
                arena.put(len(rows), index, row.kv)
        arena.align([len(row.ids) for row in rows])
        held = arena.lend(len(rows), width - 1, model.attention)
    else:
        layers = zip(*(row.kv for row in rows), strict=True)
        kv = [
            (_stacked([k for k, _ in x], width), _stacked([v for _, v in x], width)) for x in layers
        ]
        held = HeldKV(kv, width - 1)
    logits = torch.cat([row.logits for row in rows])
    shortest = min(row.layout.query_length for row in rows)
    return partial(LinkedPrompt, inputs, held, logits, shortest, attach=attach)


def _side_by_side(
    rows: list[LinkedRow], lse_scale: float, width: int, device: torch.device
) -> tuple[Tensor, Attached]:
    """Rotary positions ``[batch, width]``, and what decoding behind these rows must know."""
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    inside = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        start, layout = width - len(row.ids), row.layout
        positions[index, start:] = layout.parallel_positions()
        inside[index, start + layout.prefix_length : start + layout.context_length] = True
    lag = width - 1 - positions[:, -1]
    return positions.to(device), Attached(inside.to(device), lse_scale, lag.to(device))


def _stacked(tensors: list[Tensor], width: int) -> Tensor:
    """The KV of all tokens but the last of each row, padded on the left to ``width - 1`` tokens.

    A view where there is a single row.
    """
    kept = [tensor[:, :, :-1] for tensor in tensors]
    if len(kept) == 1:
        return kept[0]
    pad = torch.nn.functional.pad
    return torch.cat([pad(t, (0, 0, width - 1 - t.shape[2], 0)) for t in kept])
