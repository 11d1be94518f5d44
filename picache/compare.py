"""Link methods against full prefill, on the same questions about the same documents."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from picache.answers import begins, f1
from picache.arguments import whole_number
from picache.chunk import Chunk
from picache.comparison import Comparison
from picache.errors import PICacheError
from picache.linking.prompt import LinkedPrompt
from picache.methods import FullRecompute
from picache.methods.base import LinkMethod
from picache.methods.presets import Arm
from picache.pic import PIC
from picache.problem import Problem, answer_ids, check_problems, pieces
from picache.progress import bar
from picache.sinks import Sinks
from picache.text_ids import ids_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from picache.hf.decoding import Answered, Prefilled

METRICS = {
    "accuracy": "whether the greedy answer begins with an answer; where problems have answers",
    "f1": "overlap of its words with those of the best answer; where problems have answers",
    "extra_nll": "nats a token of the first answer above full prefill, teacher-forced",
    "kl": "KL(full || arm) in nats, mean over the answer's tokens",
    "agreement": "share of the answer's tokens that full prefill finds likeliest and the arm too",
    "recomputed": "share of the prompt's tokens that went through the layers, mean over layers",
    "operations": "floating-point operations of the prompt as a share of full prefill's, estimated",
    "first_token_seconds": "seconds to the logits of the first new token, chunks compiled before",
}
"""What `compare` measures of each problem."""

HIGHER_IS_BETTER = frozenset({"accuracy", "f1", "agreement"})

DRAWN = ("recomputed", "extra_nll")

FULL = "full"

KEPT = 2**30
"""Bytes of compiled chunks beyond which those of earlier problems are let go."""


@torch.no_grad()
def compare(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    methods: Sequence[LinkMethod | Arm] | Mapping[str, LinkMethod | Arm],
    *,
    new_tokens: int = 16,
    metrics: Sequence[str] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Comparison:
    """Answer every problem under full prefill and under each method.

    Full prefill is the model's own forward over the ids that the methods link, so that all arms
    share model, ids, query and decoding. Documents are compiled before anything is timed.

    Args:
        model: a causal language model that `PIC` can link.
        tokenizer: of the model; its chat template is used if it has one (`picache.problem.pieces`).
        problems: questions with documents, all with answers or none; without, what full prefill
            answers stands for the answer, and accuracy and f1 are left out.
        methods: what to compare, named by their repr; an `Arm` also names its sinks. Or a mapping
            that gives names, such as `picache.arms`; its "full" is the full prefill.
        new_tokens: how many tokens are decoded for an answer, greedily.
        metrics: which of `METRICS` to measure, so that one that needs answers is refused where
            there are none; by default all that can be.
        progress: whether to show a bar, where tqdm is installed.
        seed: of the intervals.

    Returns:
        A `Comparison` with the metrics of `METRICS`, full prefill first. Its settings hold the
        tokens of each prompt and the greedy answers: `settings["decoded"]`, by arm.

    Raises:
        PICacheError: no problems, answers to some of them only or longer than new_tokens, a metric
            that needs answers where there are none, no methods, two arms of one name, some arms
            that keep the BOS of chunks and some that do not, a prompt longer than the model's
            positions; before anything runs.
    """
    check_problems(problems)
    arms = _named(methods)
    wanted = _wanted(metrics, bool(problems[0].answers))
    new_tokens = whole_number("compare needs a whole number of new_tokens", new_tokens, least=1)
    seed = whole_number("compare needs a whole number as its seed", seed, least=0)
    _check_lengths(model, tokenizer, problems, new_tokens)
    from picache.hf.decoding import answers  # transformers is loaded with the model

    linker = _Linker(model, tokenizer, arms)
    stop = _stop_tokens(model, tokenizer)
    values: dict[str, dict[str, list[float]]] = {name: {} for name in (FULL, *arms)}
    decoded: dict[str, list[str]] = {name: [] for name in values}
    for index, problem in enumerate(
        bar(problems, f"full prefill and {len(arms)} methods", "problem", progress)
    ):
        target = None
        if problem.answers:
            target = torch.tensor(answer_ids(problem, tokenizer), device=model.device)
        found = answers(model, linker.prompts(index, problem), new_tokens, stop, target)
        full = next(found)
        if target is None:
            target = full.tokens
        for name, answered in zip(values, (full, *found), strict=True):
            text = str(tokenizer.decode(answered.tokens, skip_special_tokens=True))
            decoded[name].append(text)
            _record(values[name], problem, answered, full, target, text)
    arrays = {n: {m: np.array(of[m]) for m in wanted} for n, of in values.items()}
    settings: dict[str, Any] = {"model": model.name_or_path, "new_tokens": new_tokens, "seed": seed}
    settings |= {"prompt_tokens": linker.prompt_tokens, "decoded": decoded}
    drawn = DRAWN if set(DRAWN) <= set(wanted) else None
    return Comparison(arrays, "problems", HIGHER_IS_BETTER, settings, seed, drawn)


class _Linker:
    """Links the prompt of a problem by every arm; what arms or problems share is compiled once."""

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", arms: dict[str, Arm]
    ) -> None:
        self._pic = PIC(model, tokenizer, flops_per_byte=None)
        self._tokenizer, self._arms = tokenizer, arms
        self._pics: dict[Sinks, PIC] = {}
        for name, arm in arms.items():
            with _naming(f"arm {name!r}"):
                self._pics[arm.sinks] = self._pics.get(arm.sinks) or self._pic.behind(arm.sinks)
        self._compiled: dict[tuple[Sinks, str, bool], Chunk] = {}
        self.prompt_tokens: list[int] = []  # of each problem's prompt

    def prompts(self, index: int, problem: Problem) -> "Iterator[Prefilled]":
        """The prompt of `problem` prefilled in full, then by each arm; the same ids in all."""
        from picache.hf.decoding import Prefilled  # transformers is loaded with the model

        if self._pic.store.nbytes > KEPT:
            self._pic.store.clear()
            self._compiled.clear()
        ids: Tensor | None = None
        for name, arm in self._arms.items():
            with _naming(f"arm {name!r} on problem {index}"):
                prompt = self._link(problem, arm)
            if ids is None:
                ids = prompt.input_ids
                self.prompt_tokens.append(ids.shape[1])
                yield self._full_prefill(ids)
            if not torch.equal(prompt.input_ids, ids):
                raise PICacheError(
                    f"arm {name!r} links {prompt.input_ids.shape[1]} tokens where others link "
                    f"{ids.shape[1]}: arms of one comparison share their ids, so compare "
                    "sinks='keep' on its own"
                )
            place, attached = ids.shape[1] - 1, None
            if (
                "position_ids" in prompt
            ):  # chunks side by side, and attention changed while decoding
                place, attached = int(prompt["position_ids"][0, -1]), prompt.attached
            report = prompt.report
            share = report.tokens_recomputed / report.tokens_total
            yield Prefilled(
                ids[:, -1:],
                prompt.logits,
                prompt.past_key_values.kv,
                place,
                share,
                report.flops / report.flops_full_prefill,
                report.seconds["first_token"],
                attached,
            )

    def _full_prefill(self, ids: Tensor) -> "Prefilled":
        """The model's own forward, nothing reused."""
        from picache.hf.decoding import Prefilled

        self._pic.hf.finish()
        begun = time.perf_counter()
        logits, kv = self._pic.hf.full_prefill(ids[0])
        self._pic.hf.finish()
        seconds = time.perf_counter() - begun
        held = [(keys[:, :, :-1], values[:, :, :-1]) for keys, values in kv]
        return Prefilled(ids[:, -1:], logits, held, ids.shape[1] - 1, 1.0, 1.0, seconds)

    def _link(self, problem: Problem, arm: Arm) -> LinkedPrompt:
        prefix, documents, query = pieces(problem, self._tokenizer)
        texts = [*([prefix] if prefix else []), *documents]
        chunks = [self._chunk(arm.sinks, text, not place) for place, text in enumerate(texts)]
        self._pic.hf.finish()  # on a GPU compiling is only under way
        return self._pics[arm.sinks].link(chunks, query, method=arm.method)

    def _chunk(self, sinks: Sinks, text: str, first: bool) -> Chunk:
        """A chunk compiled behind `sinks`, unless it has been already."""
        key = (sinks, text, first)
        if key not in self._compiled:
            self._compiled[key] = self._pics[sinks].compile(text, first=first)
        return self._compiled[key]


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Inside the block an error says what it happened to."""
    try:
        yield
    except PICacheError as error:
        raise PICacheError(f"{what}: {error}") from error


def _record(
    into: dict[str, list[float]],
    problem: Problem,
    arm: "Answered",
    full: "Answered",
    target: Tensor,
    answer: str,
) -> None:
    """Append what an arm measures, held against full prefill, to its lists."""
    ours, reference = arm.log_probabilities, full.log_probabilities
    nll, own = (-float(one.gather(1, target[:, None]).mean()) for one in (ours, reference))
    measured = {}
    if problem.answers:
        measured = {
            "accuracy": max(map(partial(begins, answer), problem.answers)),
            "f1": max(map(partial(f1, answer), problem.answers)),
        }
    measured |= {
        "extra_nll": nll - own,
        "kl": float((reference.exp() * (reference - ours)).sum(-1).mean()),
        "agreement": float((ours.argmax(-1) == reference.argmax(-1)).double().mean()),
        "recomputed": arm.recomputed,
        "operations": arm.operations,
        "first_token_seconds": arm.seconds,
    }
    for metric, value in measured.items():
        into.setdefault(metric, []).append(value)


def _wanted(metrics: Sequence[str] | None, answered: bool) -> list[str]:
    """The metrics asked for, which can be measured; in the order of `METRICS`."""
    known = [name for name in METRICS if answered or name not in ("accuracy", "f1")]
    if metrics is None:
        return known
    if isinstance(metrics, str) or not metrics:
        raise PICacheError(f"metrics must be a list of names, got {metrics!r}")
    for name in metrics:
        if name not in METRICS:
            raise PICacheError(f"there is no metric {name!r}; there are {', '.join(METRICS)}")
        if name not in known:
            raise PICacheError(f"{name!r} needs answers: give them, or leave it out")
    return [name for name in known if name in metrics]


def _named(
    methods: Sequence[LinkMethod | Arm] | Mapping[str, LinkMethod | Arm],
) -> dict[str, Arm]:
    """Arms by name, each name once."""
    if isinstance(methods, Mapping):
        pairs = list(methods.items())
    elif isinstance(methods, list | tuple):
        pairs = [(_name(method), method) for method in methods]
    else:
        raise PICacheError(f"methods must be a list or a mapping, got {type(methods).__name__}")
    arms: dict[str, Arm] = {}
    for name, method in pairs:
        if not isinstance(method, LinkMethod | Arm):
            raise PICacheError(f"{method!r} is no link method: give one such as LegoLink(k=16)")
        arm = method if isinstance(method, Arm) else Arm(method)
        if name == FULL and isinstance(arm.method, FullRecompute):
            continue  # what every arm is held against, and comes first anyway
        if name in arms or name == FULL:
            raise PICacheError(f"two arms are named {name!r}: give a mapping of names to methods")
        if arm.flops_per_byte is not None:
            raise PICacheError(
                f"arm {name!r} would be a full prefill where linking costs as much: arms that are "
                "compared link whatever it costs, so leave out flops_per_byte"
            )
        arms[name] = arm
    if not arms:
        raise PICacheError("methods is empty: full prefill has nothing to be compared with")
    keeping = [name for name, arm in arms.items() if arm.sinks == "keep"]
    if keeping and len(keeping) < len(arms):
        other = next(name for name in arms if name not in keeping)
        raise PICacheError(
            f"arm {keeping[0]!r} keeps the BOS of its chunks in the prompt and arm {other!r} does "
            "not: arms of one comparison share their ids, so compare sinks='keep' on its own"
        )
    return arms


def _name(method: LinkMethod | Arm) -> str:
    if isinstance(method, Arm):
        return repr(method.method) + ("" if method.sinks == "drop" else f", {method.sinks!r}")
    return repr(method)


def _check_lengths(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    new_tokens: int,
) -> None:
    """Refuse a prompt that does not fit, before anything runs."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)  # some models state no limit
    embedding: Any = model.get_input_embeddings()
    for index, problem in enumerate(problems):
        prefix, documents, query = pieces(problem, tokenizer)
        texts = [*([prefix] if prefix else []), *documents, query]
        count = new_tokens
        if problem.answers:
            _check_answers(index, problem, tokenizer, new_tokens)
            count = max(count, len(answer_ids(problem, tokenizer)))
        for place, text in enumerate(texts):
            found = ids_of_text(text, tokenizer, embedding.weight.shape[0], f"problem {index}")
            count += len(found.ids) - (found.lead if place else 0)
        if limit is not None and count > limit:
            raise PICacheError(
                f"problem {index} needs {count} tokens, its answer included, and the model has "
                f"{limit} positions: give fewer or shorter documents"
            )


def _check_answers(
    index: int, problem: Problem, tokenizer: "PreTrainedTokenizerBase", new_tokens: int
) -> None:
    """Refuse answers without tokens, and those that nothing decoded could be."""
    if not answer_ids(problem, tokenizer):
        raise PICacheError(
            f"the answer {problem.answers[0]!r} of problem {index} has no tokens: give a text that "
            "the tokenizer makes tokens of"
        )
    each = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in problem.answers]
    shortest = min(map(len, each))
    if shortest > new_tokens:
        raise PICacheError(
            f"the answers of problem {index} have {shortest} tokens or more and new_tokens is "
            f"{new_tokens}, so that no arm could be right: raise new_tokens"
        )


def _stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Ids that end an answer: those of the model, else that of the tokenizer."""
    config: Any = model.generation_config
    found = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found) if isinstance(found, list) else frozenset({int(found)})
