"""Decoding for a comparison: dense, and a cache under a policy along the tokens that dense took.

Texts go through in batches. Prompts are padded on the left, as `generate` wants them; a row that
ends before others is fed on with any tokens, of which nothing is measured.
"""

import copy
import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsity.hf.layers import layer_bytes

TIMED_STEPS = 8  # of dense, where its texts are known and need not be decoded


@dataclass
class Decoding:
    """A model and a cache on their way through a batch of texts, with a stopwatch.

    Attributes:
        model: a causal language model.
        cache: what `model` reads and writes; None until the first forward, which makes the model's
            own `DynamicCache`.
        pads: padding columns at the left of each row, int64 `[rows]`; None for none in any row.
        fed: columns so far.
        seconds: of each single column fed, to its logits.
    """

    model: Any
    cache: Any = None
    pads: Tensor | None = None
    fed: int = 0
    seconds: list[float] = field(default_factory=list)

    def read(self, ids: Tensor, keep: int) -> Tensor:
        """Feed several columns in one forward.

        Args:
            ids: int64 `[rows, columns]`.
            keep: how many last columns to compute logits of.

        Returns:
            Logits `[rows, keep, vocab_size]`, as the model gives them.
        """
        before, self.fed = self.fed, self.fed + ids.shape[1]
        padding: dict[str, Tensor] = {}
        if self.pads is not None:  # as generate says it
            ranks = torch.arange(self.fed, device=ids.device) - self.pads[:, None]
            padding["attention_mask"] = (ranks >= 0).long()
            padding["position_ids"] = ranks[:, before:].clamp(min=0)
        out = self.model(
            input_ids=ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
            **padding,
        )
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -keep:]
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token a row, int64 `[rows]`, as `generate` does; logits `[rows, vocab_size]`."""
        self._wait()
        begun = time.perf_counter()
        logits = self.read(tokens[:, None], keep=1)[:, 0]
        self._wait()
        self.seconds.append(time.perf_counter() - begun)
        return logits

    def greedy(
        self,
        logits: Tensor,
        said: list[list[int]],
        end: "End",
        kept: list[Tensor] | None = None,
    ) -> None:
        """Decode the likeliest tokens until every row has ended.

        Args:
            logits: of the next token of each row, `[rows, vocab_size]`.
            said: what each row has decoded so far; rows that have not ended get more.
            end: of a row.
            kept: where to put the logits of each step, in order; None to put them nowhere.
        """
        goes_on = not all(map(end.reached, said))
        while goes_on:
            if kept is not None:
                kept.append(logits)
            tokens = logits.argmax(-1)
            for row, token in zip(said, tokens.tolist(), strict=True):
                if not end.reached(row):
                    row.append(token)
            goes_on = not all(map(end.reached, said))
            if goes_on:
                logits = self.step(tokens)

    def branch(self) -> "Decoding":
        """The same place in the texts with a cache of its own."""
        return Decoding(self.model, copy.deepcopy(self.cache), self.pads, self.fed)

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


@dataclass(frozen=True)
class End:
    """Where a row that decodes by itself ends.

    Attributes:
        most: how many tokens it decodes at most; 0 for none.
        stop: ids of tokens behind which nothing comes.
    """

    most: int
    stop: Collection[int]

    def reached(self, said: Sequence[int]) -> bool:
        """Whether a row that has decoded `said` is at its end."""
        return len(said) >= self.most or (len(said) > 0 and said[-1] in self.stop)


@dataclass(frozen=True)
class Forced:
    """What all arms are forced along, and what dense finds there.

    Attributes:
        tokens: int64 `[rows, columns]`; rows that end earlier go on with any tokens.
        lengths: how many tokens of each row are its own.
        logits: of each column, `[rows, vocab_size]`, as the model gives them: in fp32 200 MB for
            each row of 1,000 tokens of a vocabulary of 50,000.
    """

    tokens: Tensor
    lengths: list[int]
    logits: list[Tensor]


@dataclass(frozen=True)
class Run:
    """What one arm does with one text.

    Attributes:
        extra_nll: nats a token above dense.
        kl: KL(dense || arm) in nats, mean over tokens.
        agreement: share of tokens at which both find the same word likeliest.
        decoded: what was decoded greedily behind the prompt; empty where nothing was to be.
        kept_bytes: the most bytes held at once along its batch, for one of the rows: of a policy
            see `sparsity.Report.peak_bytes`; of dense those at the end, where they are the most.
        step_seconds: median of the steps of its batch.
    """

    extra_nll: float
    kl: float
    agreement: float
    decoded: list[int]
    kept_bytes: float
    step_seconds: float


def run_dense(
    model: Any,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]] | None,
    end: End,
) -> tuple[Forced, list[Run]]:
    """The model's own forward and `DynamicCache`: the prompts at once, then what comes behind them.

    Texts that are known are read in a few forwards, but for `TIMED_STEPS` of their columns in the
    middle, which are fed one by one and timed. What is not known is decoded token by token.

    Args:
        model: not attached.
        prompts: token ids of each row.
        targets: what comes behind them; None for what is decoded greedily.
        end: of what is decoded; nothing where `end.most` is 0, if `targets` are given.

    Returns:
        What the other arms are forced along, and a run for each row.
    """
    ids, pads = left_padded(prompts, model.device)
    decoding = Decoding(model, pads=pads)
    first = decoding.read(ids, keep=1)[:, 0]
    said: list[list[int]] = [[] for _ in prompts]
    logits: list[Tensor] = []
    if targets is None:
        decoding.greedy(first, said, end, logits)
        tokens = right_padded(said, model.device)
        decoding.step(tokens[:, -1])
    else:
        if end.most:
            decoding.branch().greedy(first, said, end)
        tokens = right_padded(targets, model.device)
        logits = [first, *_read_timed(decoding, tokens)[:-1]]
    forced = Forced(tokens, [len(row) for row in (said if targets is None else targets)], logits)
    held = sum(layer_bytes(layer) for layer in decoding.cache.layers) / len(prompts)
    seconds = statistics.median(decoding.seconds)
    return forced, [Run(0.0, 0.0, 1.0, row, held, seconds) for row in said]


def run_policy(
    model: Any, cache: Any, prompts: Sequence[Sequence[int]], forced: Forced, end: End
) -> list[Run]:
    """Feed the tokens that dense took one by one to a cache under a policy.

    Several in one forward would be something else: to a policy they are a prompt. While the cache
    finds likeliest what it is forced to, that is also what it decodes by itself; at the first
    difference in any row a copy of it goes its own way, with all rows.

    Args:
        model: attached.
        cache: an empty `SparseCache` of it.
        prompts: token ids of each row.
        forced: what dense did with the same prompts.
        end: of what is decoded; nothing where `end.most` is 0.

    Returns:
        A run for each row.
    """
    ids, pads = left_padded(prompts, model.device)
    decoding = Decoding(model, cache, pads)
    logits = decoding.read(ids, keep=1)[:, 0]
    apart: list[Tensor] = []
    said: list[list[int]] = [[] for _ in prompts]
    for tokens, expected in zip(forced.tokens.unbind(1), forced.logits, strict=True):
        apart.append(_apart(expected, logits, tokens))
        going = [row for row, already in enumerate(said) if not end.reached(already)]
        if going:  # so far they have said what they were fed, be it behind the end of their text
            own, given = logits.argmax(-1).tolist(), tokens.tolist()
            if all(own[row] == given[row] for row in going):
                for row in going:
                    said[row].append(own[row])
            else:
                decoding.branch().greedy(logits, said, end)
        logits = decoding.step(tokens)
    kept, seconds = cache.report().peak_bytes / len(prompts), statistics.median(decoding.seconds)
    decoding.greedy(logits, said, end)  # where texts end before what may be decoded does
    runs = []
    for row, length in enumerate(forced.lengths):
        own_text = torch.stack([column[row] for column in apart[:length]])
        extra_nll, kl, agreement = own_text.mean(0).tolist()
        runs.append(Run(extra_nll, kl, agreement, said[row], kept, seconds))
    return runs


def left_padded(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Rows of ids as one tensor, int64 `[rows, columns]`, and the padding at the left of each.

    The padding is int64 `[rows]`; None where all rows have the same length.
    """
    width = max(map(len, rows))
    pads = [width - len(row) for row in rows]
    ids = [[0] * pad + list(row) for pad, row in zip(pads, rows, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(pads, device=device) if any(
        pads
    ) else None


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of ids as one tensor, int64 `[rows, columns]`, with 0 behind those that end earlier."""
    width = max(map(len, rows))
    return torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=device)


def _read_timed(decoding: Decoding, tokens: Tensor) -> list[Tensor]:
    """Logits behind each column, `[rows, vocab_size]`; those in the middle are fed in steps."""
    steps = min(TIMED_STEPS, tokens.shape[1])
    first = (tokens.shape[1] - steps) // 2
    before, between, behind = tokens.tensor_split([first, first + steps], dim=1)
    logits: list[Tensor] = []
    if before.shape[1]:
        logits += decoding.read(before, keep=before.shape[1]).unbind(1)
    logits += [decoding.step(column) for column in between.unbind(1)]
    if behind.shape[1]:
        logits += decoding.read(behind, keep=behind.shape[1]).unbind(1)
    return logits


def _apart(dense: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
    """Of each row's token: extra nats, KL(dense || other) and agreement, fp64 `[rows, 3]`.

    Args:
        dense: logits `[rows, vocab_size]`.
        logits: of the other arm, as `dense`.
        tokens: int64 `[rows]`.
    """
    expected, found = dense.double().log_softmax(-1), logits.double().log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1)
    extra = (expected - found).gather(-1, tokens[:, None])[:, 0]
    same = (dense.argmax(-1) == logits.argmax(-1)).double()
    return torch.stack([extra, divergence, same], -1)
