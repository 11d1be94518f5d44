"""Answers behind prompts whose KV is known, decoded or forced, several prompts in one batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from picache.chunk import KV
from picache.hf.held_kv import HeldKV
from picache.hf.linked_cache import LinkedCache

TOGETHER = 2**30
"""Bytes of KV up to which prompts are decoded in one batch, for which they are copied."""


@dataclass(frozen=True)
class Prefilled:
    """A prompt of which everything but the answer is computed.

    Attributes:
        last: its last token's id, int64 ``[1, 1]``.
        logits: of the first new token, ``[1, vocab_size]``.
        kv: keys and values by layer, of every token but the last.
        position: rotary position of the last token.
        recomputed: share of its tokens that went through the layers, the mean over layers.
        operations: floating-point operations as a share of a full prefill's, estimated.
        seconds: what it took to come to the logits.
        attached: makes the block in which the model serves this prompt alone, where its method
            changes attention; None where it does not.
    """

    last: Tensor
    logits: Tensor
    kv: list[KV]
    position: int
    recomputed: float
    operations: float
    seconds: float
    attached: Callable[[], AbstractContextManager[None]] | None = None


@dataclass(frozen=True)
class Answered:
    """What stands behind a prompt.

    Attributes:
        tokens: the likeliest token, again and again, up to one that ends an answer; int64
            ``[tokens]``.
        log_probabilities: of every token at each token of the target, fp64 ``[target, vocab]``.
        recomputed: see `Prefilled`.
        operations: see `Prefilled`.
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
    prompts: Iterable[Prefilled],
    new_tokens: int,
    stop: frozenset[int],
    target: Tensor | None = None,
) -> Iterator[Answered]:
    """Decode behind every prompt, greedily, and force the same tokens behind all of them.

    Args:
        model: a causal language model.
        prompts: of one length; no more of them are held at a time than go into one batch.
        new_tokens: how many tokens to decode, at least 1.
        stop: ids of the tokens that end an answer.
        target: what is forced, int64 ``[tokens]``; what is decoded behind the first prompt if None.
    """
    for batch in _batches(prompts):
        decoded = _decoded(model, batch, new_tokens, stop)
        target = decoded[0] if target is None else target
        fed = torch.cat([batch.last, target[None, :-1].expand(len(decoded), -1)], dim=1)
        logits = _Feeding(model, batch).feed(fed, keep=len(target))
        for tokens, row, prompt in zip(decoded, logits, batch.prompts, strict=True):
            forced = row.double().log_softmax(-1)
            yield Answered(tokens, forced, prompt.recomputed, prompt.operations, prompt.seconds)


class _Batch:
    """Prompts that are fed alike; ``prompts[0]`` speaks for all where they do not differ."""

    def __init__(self, prompts: Sequence[Prefilled]) -> None:
        self.prompts = prompts
        self.last = torch.cat([prompt.last for prompt in prompts])
        self.logits = torch.cat([prompt.logits for prompt in prompts])
        layers = zip(*(prompt.kv for prompt in prompts), strict=True)
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
        self._cache = LinkedCache(HeldKV(batch.kv, batch.kv[0][0].shape[2]))
        self._position = batch.prompts[0].position
        self._attached = batch.prompts[0].attached or nullcontext

    def feed(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Go on by ids ``[rows, tokens]``; logits of the last `keep`, ``[rows, keep, vocab]``."""
        end = self._position + ids.shape[1]
        positions = torch.arange(self._position, end, device=ids.device)[None]
        self._position = end
        with self._attached():
            logits: Tensor = self._model(
                input_ids=ids,
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


def _batches(prompts: Iterable[Prefilled]) -> Iterator[_Batch]:
    """Neighbours together up to `TOGETHER` bytes; what must be attached stands alone."""
    waiting: list[Prefilled] = []
    held = 0
    for prompt in prompts:
        nbytes = sum(tensor.nbytes for layer in prompt.kv for tensor in layer)
        alone = any(one.attached is not None for one in (prompt, *waiting))
        if waiting and (alone or held + nbytes > TOGETHER):
            yield _Batch(waiting)
            waiting, held = [], 0
        waiting.append(prompt)
        held += nbytes
    if waiting:
        yield _Batch(waiting)
