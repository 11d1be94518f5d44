"""Answers behind prompts whose KV is known, decoded or forced, of several arms in one batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from picache.chunk import KV
from picache.hf.held_kv import HeldKV
from picache.hf.linked_cache import LinkedCache

TOGETHER = 2**30
"""Bytes of KV up to which prompts are decoded in one batch, for which they are copied; on a GPU a
tenth of its free memory, if that is more."""


@dataclass(frozen=True)
class Prefilled:
    """Prompts of which everything but the answer is computed: rows, padded on the left.

    Attributes:
        last: the id of each one's last token, int64 ``[rows, 1]``.
        logits: of the first new tokens, ``[rows, vocab_size]``.
        kv: keys and values by layer, of every token but the last.
        positions: rotary position of each one's last token.
        padding: how many tokens in front of each are padding.
        recomputed: share of each one's tokens that went through the layers, the mean over layers.
        operations: floating-point operations of each as a share of a full prefill's, estimated.
        seconds: what it took to come to the logits, of all rows together.
        attached: makes the block in which the model serves these prompts alone, where their method
            changes attention; None where it does not.
    """

    last: Tensor
    logits: Tensor
    kv: list[KV]
    positions: tuple[int, ...]
    padding: tuple[int, ...]
    recomputed: tuple[float, ...]
    operations: tuple[float, ...]
    seconds: float
    attached: Callable[[], AbstractContextManager[None]] | None = None


@dataclass(frozen=True)
class Answered:
    """What stands behind a prompt.

    Attributes:
        tokens: the likeliest token, again and again, up to one that ends an answer; int64
            ``[tokens]``.
        log_probabilities: of every token at each token of the target, fp64 ``[target, vocab]``.
        recomputed: see `Prefilled`; of this prompt.
        operations: see `Prefilled`; of this prompt.
        seconds: see `Prefilled`.
    """

    tokens: Tensor
    log_probabilities: Tensor
    recomputed: float
    operations: float
    seconds: float


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    arms: Iterable[Prefilled],
    new_tokens: int,
    stop: frozenset[int],
    targets: Sequence[Tensor] | None = None,
) -> Iterator[list[Answered]]:
    """Decode behind the same prompts of every arm, greedily, and force the same tokens behind them.

    Args:
        model: a causal language model.
        arms: each with as many rows, which are as long; no more of them are held at a time than go
            into one batch.
        new_tokens: how many tokens to decode, at least 1.
        stop: ids of the tokens that end an answer.
        targets: what is forced behind each row, int64 ``[tokens]``; what is decoded behind it in
            the first arm if None.

    Returns:
        Of each arm what stands behind its rows.
    """
    for batch in _batches(arms):
        decoded = _decoded(model, batch, new_tokens, stop)
        if targets is None:
            targets = decoded[: len(batch.arms[0].last)]
        # What is padded behind a target is seen by none of its tokens.
        forced = pad_sequence(list(targets), batch_first=True)
        fed = torch.cat([batch.last, forced[:, :-1].repeat(len(batch.arms), 1)], dim=1)
        logits = _Feeding(model, batch).feed(fed, keep=forced.shape[1])
        rows = len(targets)
        for index, arm in enumerate(batch.arms):
            own = slice(index * rows, (index + 1) * rows)
            likely = logits[own].double().log_softmax(-1)
            yield [
                Answered(tokens, row[: len(target)], share, operations, arm.seconds)
                for tokens, row, target, share, operations in zip(
                    decoded[own], likely, targets, arm.recomputed, arm.operations, strict=True
                )
            ]


class _Batch:
    """Arms that are fed alike; ``arms[0]`` speaks for all where they do not differ."""

    def __init__(self, arms: Sequence[Prefilled]) -> None:
        self.arms = arms
        self.last = torch.cat([arm.last for arm in arms])
        self.logits = torch.cat([arm.logits for arm in arms])
        layers = zip(*(arm.kv for arm in arms), strict=True)
        self.kv = [
            (_stacked([k for k, _ in each]), _stacked([v for _, v in each])) for each in layers
        ]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One batch of several; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


class _Feeding:
    """Feeds tokens behind a batch, with a cache of its own."""

    def __init__(self, model: PreTrainedModel, batch: _Batch) -> None:
        self._model: Any = model
        held = batch.kv[0][0].shape[2]
        self._cache = LinkedCache(HeldKV(batch.kv, held))
        first, device = batch.arms[0], batch.last.device
        self._positions = torch.tensor(first.positions, device=device).repeat(len(batch.arms))
        self._mask: Tensor | None = None
        if any(first.padding):
            padding = torch.tensor(first.padding, device=device).repeat(len(batch.arms))
            self._mask = (torch.arange(held, device=device) >= padding[:, None]).long()
        self._attached = first.attached or nullcontext

    def feed(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Go on by ids ``[rows, tokens]``; logits of the last `keep`, ``[rows, keep, vocab]``."""
        steps = torch.arange(ids.shape[1], device=ids.device)
        positions = self._positions[:, None] + steps
        self._positions = self._positions + ids.shape[1]
        if self._mask is not None:
            self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        with self._attached():
            logits: Tensor = self._model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits
        return logits


def _decoded(
    model: PreTrainedModel, batch: _Batch, new_tokens: int, stop: frozenset[int]
) -> list[Tensor]:
    """The answers of a batch, each int64 ``[at most new_tokens]``."""
    feeding = _Feeding(model, batch)
    chosen = batch.logits.argmax(-1, keepdim=True)
    new, fed = chosen, torch.cat([batch.last, chosen], dim=1)
    while new.shape[1] < new_tokens and not all(stop & set(row) for row in new.tolist()):
        chosen = feeding.feed(fed)[:, -1].argmax(-1, keepdim=True)
        new, fed = torch.cat([new, chosen], dim=1), chosen
    return [_until(row, stop) for row in new]


def _until(answer: Tensor, stop: frozenset[int]) -> Tensor:
    """An answer up to the token that ends it, that token included."""
    over = next((i for i, token in enumerate(answer.tolist()) if token in stop), len(answer))
    return answer[: over + 1]


def _batches(arms: Iterable[Prefilled]) -> Iterator[_Batch]:
    """Neighbours together as far as there is room; what must be attached stands alone."""
    waiting: list[Prefilled] = []
    held = 0
    room = TOGETHER
    for arm in arms:
        if not waiting:
            room = max(TOGETHER, _free_bytes(arm.last.device) // 10)
        nbytes = sum(tensor.nbytes for layer in arm.kv for tensor in layer)
        alone = any(one.attached is not None for one in (arm, *waiting))
        if waiting and (alone or held + nbytes > room):
            yield _Batch(waiting)
            waiting, held = [], 0
        waiting.append(arm)
        held += nbytes
    if waiting:
        yield _Batch(waiting)


def _free_bytes(device: torch.device) -> int:
    """Bytes that tensors on a CUDA device may still take; none elsewhere, where it is not known."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
