"""Decoding for a comparison: dense, and a cache under a policy along the tokens that dense took."""

import copy
import statistics
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsity.hf.layers import layer_bytes

TIMED_STEPS = 8  # of dense, where its text is known and need not be decoded


@dataclass
class Decoding:
    """A model and a cache on their way through one text, with a stopwatch.

    Attributes:
        model: a causal language model.
        cache: what `model` reads and writes; None until the first forward, which makes the model's
            own `DynamicCache`.
        seconds: of each single token fed, to its logits.
    """

    model: Any
    cache: Any = None
    seconds: list[float] = field(default_factory=list)

    def read(self, ids: Tensor, keep: int) -> Tensor:
        """Feed several tokens in one forward.

        Args:
            ids: int64 `[tokens]`.
            keep: how many last tokens to compute logits of.

        Returns:
            Logits `[keep, vocab_size]`, as the model gives them.
        """
        out = self.model(
            input_ids=ids[None], past_key_values=self.cache, use_cache=True, logits_to_keep=keep
        )
        self.cache = out.past_key_values
        logits: Tensor = out.logits[0, -keep:]
        return logits

    def step(self, token: Tensor) -> Tensor:
        """Feed one token, int64 `[1]`, as `generate` does; its logits, `[vocab_size]`."""
        self._wait()
        begun = time.perf_counter()
        logits = self.read(token, keep=1)[0]
        self._wait()
        self.seconds.append(time.perf_counter() - begun)
        return logits

    def greedy(
        self, logits: Tensor, most: int, stop: Collection[int], rows: list[Tensor] | None = None
    ) -> list[int]:
        """Decode the likeliest tokens, one that stops included.

        Args:
            logits: of the first of them, `[vocab_size]`.
            most: how many tokens at most.
            stop: ids of tokens after which nothing comes.
            rows: where to put the logits of each token, in order; None to put them nowhere.
        """
        tokens: list[int] = []
        while len(tokens) < most:
            if rows is not None:
                rows.append(logits)
            token = logits.argmax()
            tokens.append(int(token))
            if tokens[-1] in stop or len(tokens) == most:
                break
            logits = self.step(token[None])
        return tokens

    def branch(self) -> "Decoding":
        """The same place in the text with a cache of its own."""
        return Decoding(self.model, copy.deepcopy(self.cache))

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


@dataclass(frozen=True)
class DenseRun:
    """What dense attention does with one text.

    Attributes:
        target: the tokens that all arms are forced along, int64 `[tokens]`.
        logits: of each of them, `[vocab_size]`, as the model gives them: in fp32 200 MB for 1,000
            tokens of a vocabulary of 50,000.
        decoded: what was decoded greedily behind the prompt; empty where nothing was to be.
        kept_bytes: bytes of its cache at the end of the text, where it is largest.
        step_seconds: median of its steps.
        extra_nll, kl, agreement: as of `PolicyRun`, of dense against itself.
    """

    target: Tensor
    logits: list[Tensor]
    decoded: list[int]
    kept_bytes: int
    step_seconds: float
    extra_nll: float = 0.0
    kl: float = 0.0
    agreement: float = 1.0


@dataclass(frozen=True)
class PolicyRun:
    """What a cache under a policy does along the same tokens.

    Attributes:
        extra_nll: nats a token above dense.
        kl: KL(dense || policy) in nats, mean over tokens.
        agreement: share of tokens at which both find the same word likeliest.
        decoded: what was decoded greedily behind the prompt; empty where nothing was to be.
        kept_bytes: the most bytes held at once, see `sparsity.Report.peak_bytes`.
        step_seconds: median of its steps.
    """

    extra_nll: float
    kl: float
    agreement: float
    decoded: list[int]
    kept_bytes: int
    step_seconds: float


def run_dense(
    model: Any, prompt: Tensor, target: Tensor | None, most: int, stop: Collection[int]
) -> DenseRun:
    """The model's own forward and `DynamicCache`: the prompt at once, then what comes behind it.

    A text that is known is read in a few forwards, but for `TIMED_STEPS` of its tokens in the
    middle, which are fed one by one and timed. What is not known is decoded token by token.

    Args:
        model: not attached.
        prompt: int64 `[tokens]`.
        target: what comes behind it, int64 `[tokens]`; None for what is decoded greedily.
        most: how many tokens are decoded; 0 for none, where `target` is given.
        stop: ids of tokens after which nothing is decoded.
    """
    decoding = Decoding(model)
    logits = [decoding.read(prompt, keep=1)[0]]
    if target is None:
        decoded = decoding.greedy(logits.pop(), most, stop, logits)
        target = torch.tensor(decoded, device=prompt.device)
        decoding.step(target[-1:])
    else:
        decoded = decoding.branch().greedy(logits[0], most, stop) if most else []
        logits += _read_timed(decoding, target)[:-1]
    held = sum(layer_bytes(layer) for layer in decoding.cache.layers)
    return DenseRun(target, logits, decoded, held, statistics.median(decoding.seconds))


def run_policy(
    model: Any, cache: Any, prompt: Tensor, dense: DenseRun, most: int, stop: Collection[int]
) -> PolicyRun:
    """Feed the tokens that dense took one by one to a cache under a policy.

    Several in one forward would be something else: to a policy they are a prompt. While the cache
    finds likeliest what it is forced to, that is also what it decodes by itself; at the first
    difference a copy of it goes its own way.

    Args:
        model: attached.
        cache: an empty `SparseCache` of it.
        prompt: int64 `[tokens]`.
        dense: of the same prompt.
        most: how many tokens are decoded; 0 for none.
        stop: ids of tokens after which nothing is decoded.
    """
    decoding = Decoding(model, cache)
    logits = decoding.read(prompt, keep=1)[0]
    apart: list[Tensor] = []
    decoded: list[int] = []
    together = most > 0  # what is forced is what would be decoded
    for token, expected in zip(dense.target, dense.logits, strict=True):
        apart.append(_apart(expected, logits, token))
        if together:
            together = bool(logits.argmax() == token)
            together = together and int(token) not in stop and len(decoded) + 1 < most
            if together:
                decoded.append(int(token))
            else:
                decoded += decoding.branch().greedy(logits, most - len(decoded), stop)
        logits = decoding.step(token[None])
    kept, seconds = cache.report().peak_bytes, statistics.median(decoding.seconds)
    if together:  # the text ends before what may be decoded does
        decoded += decoding.greedy(logits, most - len(decoded), stop)
    extra_nll, kl, agreement = torch.stack(apart).mean(0).tolist()
    return PolicyRun(extra_nll, kl, agreement, decoded, kept, seconds)


def _read_timed(decoding: Decoding, tokens: Tensor) -> list[Tensor]:
    """Logits behind each token; those in the middle are fed in steps."""
    steps = min(TIMED_STEPS, len(tokens))
    first = (len(tokens) - steps) // 2
    before, between, behind = tokens.tensor_split([first, first + steps])
    logits: list[Tensor] = []
    if len(before):
        logits += decoding.read(before, keep=len(before))
    logits += [decoding.step(token[None]) for token in between]
    if len(behind):
        logits += decoding.read(behind, keep=len(behind))
    return logits


def _apart(dense: Tensor, logits: Tensor, token: Tensor) -> Tensor:
    """Extra nats of a token, KL(dense || other) and agreement, fp64 `[3]`, of logits `[words]`."""
    expected, found = dense.double().log_softmax(-1), logits.double().log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum()
    same = (dense.argmax() == logits.argmax()).double()
    return torch.stack([expected[token] - found[token], divergence, same])
