"""Link methods against full prefill, on the same questions about the same documents."""

import math
import string
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from picache.comparison import Comparison
from picache.errors import PICacheError
from picache.linking.prompt import LinkedPrompt
from picache.methods.base import LinkMethod
from picache.methods.presets import Arm
from picache.pic import PIC
from picache.problem import Problem, check_problems, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = {
    "accuracy": "whether the greedy answer begins with an answer, case and punctuation aside",
    "f1": "overlap of the words of the greedy answer with those of the best answer",
    "extra_nll": "nats a token of the first answer above full prefill, teacher-forced",
    "kl": "KL(full || arm) in nats, mean over the answer's tokens",
    "agreement": "share of the answer's tokens that full prefill finds likeliest and the arm too",
    "recomputed": "share of the prompt's tokens that went through the layers, mean over layers",
    "first_token_seconds": "seconds to the logits of the first new token, chunks compiled before",
}
"""What `compare` measures of each problem."""

HIGHER_IS_BETTER = frozenset({"accuracy", "f1", "agreement"})

FULL = "full"


@torch.no_grad()
def compare(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    methods: Sequence[LinkMethod | Arm] | Mapping[str, LinkMethod | Arm],
    *,
    new_tokens: int = 16,
    progress: bool = True,
    seed: int = 0,
) -> Comparison:
    """Answer every problem under full prefill and under each method.

    Full prefill is the model's own forward over the ids that the methods link, so that all arms
    share model, ids, query and decoding. Documents are compiled before anything is timed.

    Args:
        model: a causal language model that `PIC` can link.
        tokenizer: of the model; its chat template is used if it has one (`picache.problem.pieces`).
        problems: questions with documents; without answers only `agreement` and `kl`, on what full
            prefill answers, are measured.
        methods: what to compare, named by their repr; an `Arm` also names its sinks. Or a mapping
            that gives names.
        new_tokens: how many tokens are decoded for an answer, greedily.
        progress: whether to show a bar, where tqdm is installed.
        seed: of the intervals.

    Returns:
        A `Comparison` with the metrics of `METRICS`, full prefill first.

    Raises:
        PICacheError: no problems, no methods, two arms of one name, a prompt longer than the
            model's positions; before anything runs.
    """
    check_problems(problems)
    arms = _named(methods)
    _check_lengths(model, tokenizer, problems, new_tokens)
    pics = {
        sinks: PIC(model, tokenizer, sinks=sinks, flops_per_byte=None)
        for sinks in dict.fromkeys(arm.sinks for arm in arms.values())
    }
    values: dict[str, dict[str, list[float]]] = {n: {m: [] for m in METRICS} for n in (FULL, *arms)}
    for problem in _bar(problems, progress):
        full: _Run | None = None
        for name, arm in arms.items():
            prompt = _link(pics[arm.sinks], tokenizer, problem, arm.method)
            ids = prompt["input_ids"]
            if full is None:
                full = _full_prefill(model, tokenizer, problem, ids, new_tokens)
                _record(values[FULL], problem, full, full)
            if not torch.equal(ids, full.ids):
                raise PICacheError(
                    f"arm {name!r} links {ids.shape[1]} tokens where others link "
                    f"{full.ids.shape[1]}: arms of one comparison share their ids, so compare "
                    "sinks='keep' on its own"
                )
            _record(
                values[name], problem, _linked(model, tokenizer, prompt, full, new_tokens), full
            )
    arrays = {n: {m: np.array(v) for m, v in found.items()} for n, found in values.items()}
    settings = {"model": model.name_or_path, "new_tokens": new_tokens, "seed": seed}
    return Comparison(arrays, "problems", HIGHER_IS_BETTER, settings, seed)


@dataclass(frozen=True)
class _Run:
    """One arm on one problem.

    ids: the prompt, int64 `[1, tokens]`. target: the tokens that are teacher-forced, `[answer]`.
    log_probabilities: of every token at each of them, fp64 `[answer, vocab_size]`. answer: what was
    decoded. recomputed: share of the prompt. seconds: to the logits of the first new token.
    """

    ids: Tensor
    target: Tensor
    log_probabilities: Tensor
    answer: str
    recomputed: float
    seconds: float


def _full_prefill(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    problem: Problem,
    ids: Tensor,
    new_tokens: int,
) -> _Run:
    """The model's own forward, nothing reused."""
    _wait(model)
    begun = time.perf_counter()
    forward: Any = model
    forward(input_ids=ids, logits_to_keep=1)
    _wait(model)
    seconds = time.perf_counter() - begun
    mask = torch.ones_like(ids)
    out = forward.generate(ids, attention_mask=mask, **_greedy(model, new_tokens))
    decoded = out[0, ids.shape[1] :]
    target = decoded
    if problem.answers:
        space = " " if problem.lead else ""
        answer = tokenizer(space + problem.answers[0], add_special_tokens=False)["input_ids"]
        target = torch.tensor(answer, device=ids.device)
    whole = torch.cat([ids, target[None, :-1]], dim=1)
    logits: Tensor = forward(input_ids=whole, logits_to_keep=len(target)).logits[0, -len(target) :]
    text = str(tokenizer.decode(decoded, skip_special_tokens=True))
    return _Run(ids, target, logits.double().log_softmax(-1), text, 1.0, seconds)


def _linked(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: LinkedPrompt,
    full: _Run,
    new_tokens: int,
) -> _Run:
    """Decode behind a linked prompt, and force what full prefill was forced to."""
    forward: Any = model
    with prompt.attached():
        out = forward.generate(**prompt, **_greedy(model, new_tokens))
        fed = torch.cat([full.ids[:, -1:], full.target[None, :-1]], dim=1)
        places: dict[str, Tensor] = {}
        if "position_ids" in prompt:  # chunks side by side: positions are not the tokens counted
            steps = torch.arange(fed.shape[1], device=fed.device)
            places = {"position_ids": prompt["position_ids"][:, -1:] + steps}
        cache = prompt["past_key_values"]
        logits = forward(input_ids=fed, past_key_values=cache, **places).logits[0]
    text = str(tokenizer.decode(out[0, full.ids.shape[1] :], skip_special_tokens=True))
    share = prompt.report.tokens_recomputed / prompt.report.tokens_total
    seconds = prompt.report.seconds["first_token"]
    return _Run(full.ids, full.target, logits.double().log_softmax(-1), text, share, seconds)


def _record(into: dict[str, list[float]], problem: Problem, run: _Run, full: _Run) -> None:
    """Append what `run` measures, held against `full`, to the lists of its arm."""
    nll, own = (
        -float(r.log_probabilities.gather(1, full.target[:, None]).mean()) for r in (run, full)
    )
    divergence = full.log_probabilities.exp() * (full.log_probabilities - run.log_probabilities)
    same = run.log_probabilities.argmax(-1) == full.log_probabilities.argmax(-1)
    known = bool(problem.answers)
    measured = {
        "accuracy": max(map(partial(begins, run.answer), problem.answers)) if known else math.nan,
        "f1": max(map(partial(f1, run.answer), problem.answers)) if known else math.nan,
        "extra_nll": nll - own,
        "kl": float(divergence.sum(-1).mean()),
        "agreement": float(same.double().mean()),
        "recomputed": run.recomputed,
        "first_token_seconds": run.seconds,
    }
    for metric, value in measured.items():
        into[metric].append(value)


def words(text: str) -> list[str]:
    """Words of a text in small letters, without punctuation and articles (SQuAD's rule)."""
    plain = "".join(" " if c in string.punctuation else c for c in text.lower())
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def begins(text: str, answer: str) -> float:
    """1 where `text` begins with the words of `answer`, else 0."""
    expected = words(answer)
    return float(words(text)[: len(expected)] == expected)


def f1(text: str, answer: str) -> float:
    """Token F1 of SQuAD: overlap of the words of `text` with those of `answer`."""
    found, expected = words(text), words(answer)
    both = sum((Counter(found) & Counter(expected)).values())
    return 2.0 * both / (len(found) + len(expected)) if both else 0.0


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
        if name in arms or name == FULL:
            raise PICacheError(f"two arms are named {name!r}: give a mapping of names to methods")
        arms[name] = method if isinstance(method, Arm) else Arm(method)
    if not arms:
        raise PICacheError("methods is empty: full prefill has nothing to be compared with")
    return arms


def _name(method: LinkMethod | Arm) -> str:
    if isinstance(method, Arm):
        return repr(method.method) + ("" if method.sinks == "drop" else f", {method.sinks!r}")
    return repr(method)


def _link(
    pic: PIC, tokenizer: "PreTrainedTokenizerBase", problem: Problem, method: LinkMethod
) -> LinkedPrompt:
    prefix, documents, query = pieces(problem, tokenizer)
    first = [pic.compile(prefix, first=True)] if prefix else []
    rest = [pic.compile(text, first=not first and not i) for i, text in enumerate(documents)]
    return pic.link([*first, *rest], query, method=method)


def _check_lengths(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    new_tokens: int,
) -> None:
    """Refuse a prompt that does not fit, before anything runs."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for index, problem in enumerate(problems):
        prefix, documents, query = pieces(problem, tokenizer)
        parts = (*((prefix,) if prefix else ()), *documents, query)
        count = sum(len(tokenizer(part)["input_ids"]) for part in parts) + new_tokens
        if limit is not None and count > limit:
            raise PICacheError(
                f"problem {index} needs {count} tokens and the model has {limit} positions: give "
                "fewer or shorter documents"
            )


def _greedy(model: "PreTrainedModel", new_tokens: int) -> dict[str, Any]:
    config: Any = model.generation_config
    pad = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
    pad = pad[0] if isinstance(pad, list) else pad
    return {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": pad or 0}


def _wait(model: "PreTrainedModel") -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _bar(problems: Sequence[Problem], progress: bool) -> Iterable[Problem]:
    """The problems, with a bar where one is wanted and tqdm is there."""
    if not progress:
        return problems
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return problems
    return tqdm(problems, desc="problems")
