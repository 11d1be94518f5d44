"""The prompts of problems, prefilled in full and linked by every arm of a comparison."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from picache.chunk import Chunk
from picache.errors import PICacheError
from picache.linking.prompt import LinkedPrompt
from picache.methods.presets import Arm
from picache.pic import PIC
from picache.problem import Problem, pieces
from picache.sinks import Sinks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from picache.hf.decoding import Prefilled

KEPT = 2**30
"""Bytes of compiled chunks beyond which those of earlier problems are let go."""


class ArmsLinker:
    """Links the prompts of problems by every arm; what arms or problems share is compiled once.

    Args:
        pic: of the model; links whatever it costs.
        tokenizer: of the model.
        arms: by name.
        own: whether the pic's store is for this alone, and may be emptied.
        together: how many problems are linked at once, at most. If several, each group compiles
            what it needs: what is padded together, and with it rounding, would else depend on the
            groups before, which another process may have worked on.

    Attributes:
        prompt_tokens: of each problem's prompt so far.

    Raises:
        PICacheError: when the sinks of an arm are none for this model; names the arm.
    """

    def __init__(
        self,
        pic: PIC,
        tokenizer: "PreTrainedTokenizerBase",
        arms: Mapping[str, Arm],
        own: bool,
        together: int,
    ) -> None:
        self._own, self._together = own, together
        self._pic, self._tokenizer, self._arms = pic, tokenizer, arms
        self._pics: dict[Sinks, PIC] = {}
        for name, arm in arms.items():
            with _naming(f"arm {name!r}"):
                self._pics[arm.sinks] = self._pics.get(arm.sinks) or pic.behind(arm.sinks)
        self._compiled: dict[tuple[Sinks, str, bool], Chunk] = {}
        self.prompt_tokens: list[int] = []

    def prompts(self, start: int, problems: Sequence[Problem]) -> "Iterator[Prefilled]":
        """The prompts of some problems prefilled in full, then by each arm; the same ids in all.

        Args:
            start: number of the first problem, which errors name.
            problems: linked at once by each arm.

        Raises:
            PICacheError: when an arm refuses, or links other ids than the first one; names it.
        """
        if self._own and (self._together > 1 or self._pic.store.nbytes > KEPT):
            self._pic.store.clear()
            self._compiled.clear()
        which = f"problem {start}"
        if len(problems) > 1:
            which = f"problems {start} to {start + len(problems) - 1}"
        shared: Tensor | None = None
        for name, arm in self._arms.items():
            with _naming(f"arm {name!r} on {which}"):
                prompt = self._link(problems, arm)
            if shared is None:
                shared, tokens = prompt.input_ids, prompt.report.tokens_total
                rows = _rows(prompt)
                self.prompt_tokens += map(len, rows)
                yield self._full_prefill(rows)
            if not torch.equal(prompt.input_ids, shared):
                raise PICacheError(
                    f"arm {name!r} links {prompt.report.tokens_total} tokens where others link "
                    f"{tokens}: arms of one comparison share their ids, so "
                    "compare sinks='keep' on its own"
                )
            yield _prefilled(prompt)

    def _full_prefill(self, ids: Sequence[Tensor]) -> "Prefilled":
        """The model's own forward over each prompt, nothing reused."""
        from picache.hf.decoding import Prefilled  # transformers is loaded with the model

        model = self._pic.hf
        model.finish()
        begun = time.perf_counter()
        each = [model.full_prefill(row) for row in ids]
        model.finish()
        seconds = time.perf_counter() - begun
        width = max(map(len, ids))

        def held(tensors: Sequence[Tensor]) -> Tensor:
            """What is held of all rows, padded on the left, without their last tokens."""
            kept = [tensor[:, :, :-1] for tensor in tensors]
            if len(kept) == 1:
                return kept[0]
            return torch.cat([pad(one, (0, 0, width - 1 - one.shape[2], 0)) for one in kept])

        layers = zip(*(kv for _, kv in each), strict=True)
        everything = (1.0,) * len(ids)
        return Prefilled(
            torch.stack([row[-1:] for row in ids]),
            torch.cat([logits for logits, _ in each]),
            [(held([keys for keys, _ in x]), held([values for _, values in x])) for x in layers],
            tuple(len(row) - 1 for row in ids),
            tuple(width - len(row) for row in ids),
            everything,
            everything,
            seconds,
        )

    def _link(self, problems: Sequence[Problem], arm: Arm) -> LinkedPrompt:
        pic = self._pics[arm.sinks]
        each = [pieces(problem, self._tokenizer) for problem in problems]
        texts = [[*([prefix] if prefix else []), *documents] for prefix, documents, _ in each]
        if len(problems) > 1:
            self._compile([row[0] for row in texts], arm.sinks, first=True)
            self._compile([text for row in texts for text in row[1:]], arm.sinks, first=False)
        chunks = [
            [self._chunk(arm.sinks, text, not place) for place, text in enumerate(row)]
            for row in texts
        ]
        pic.hf.finish()  # on a GPU compiling is only under way
        queries = [query for _, _, query in each]
        if len(problems) == 1:
            return pic.link(chunks[0], queries[0], method=arm.method)
        return pic.link(chunks, queries, method=arm.method)

    def _compile(self, texts: Sequence[str], sinks: Sinks, first: bool) -> None:
        """Compile chunks behind `sinks`, those at once that are not compiled yet."""
        keys = dict.fromkeys((sinks, text, first) for text in texts)
        new = [key for key in keys if key not in self._compiled]
        if not new:
            return
        made = self._pics[sinks].compile_all([text for _, text, _ in new], first)
        self._compiled.update(zip(new, made, strict=True))

    def _chunk(self, sinks: Sinks, text: str, first: bool) -> Chunk:
        """A chunk compiled behind `sinks`, unless it has been already."""
        key = (sinks, text, first)
        if key not in self._compiled:
            self._compiled[key] = self._pics[sinks].compile(text, first=first)
        return self._compiled[key]


def _rows(prompt: LinkedPrompt) -> list[Tensor]:
    """The token ids of each prompt of a batch, without padding."""
    width = prompt.input_ids.shape[1]
    tokens = [report.tokens_total for report in prompt.reports]
    return [row[width - count :] for row, count in zip(prompt.input_ids, tokens, strict=True)]


def _prefilled(prompt: LinkedPrompt) -> "Prefilled":
    """A linked batch as it is decoded."""
    from picache.hf.decoding import Prefilled  # transformers is loaded with the model

    width, reports = prompt.input_ids.shape[1], prompt.reports
    positions = tuple(report.tokens_total - 1 for report in reports)
    attached = None
    if "position_ids" in prompt:  # chunks side by side, and attention changed while decoding
        positions, attached = tuple(prompt["position_ids"][:, -1].tolist()), prompt.attached
    return Prefilled(
        prompt.input_ids[:, -1:],
        prompt.logits,
        prompt.past_key_values.kv,
        positions,
        tuple(width - report.tokens_total for report in reports),
        tuple(report.tokens_recomputed / report.tokens_total for report in reports),
        tuple(report.flops / report.flops_full_prefill for report in reports),
        prompt.report.seconds["first_token"],
        attached,
    )


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Inside the block an error says what it happened to."""
    try:
        yield
    except PICacheError as error:
        raise PICacheError(f"{what}: {error}") from error
