"""Retention policies against dense attention, along the same tokens."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from sparsity.arguments import described, whole_number
from sparsity.comparison import Comparison
from sparsity.errors import SparsityError
from sparsity.policies.base import Policy
from sparsity.problem import Problem, final_answer, is_right, overlap, prompt_ids
from sparsity.retention.batch_rows import BatchRows, plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsity.hf.cache import SparseCache
    from sparsity.hf.decoding import DenseRun, PolicyRun

T = TypeVar("T")

METRICS = {
    "extra_nll": "nats a token of the forced text above dense",
    "kl": "KL(dense || arm) in nats, mean over the tokens of the forced text",
    "agreement": "share of those tokens at which dense and the arm find the same word likeliest",
    "accuracy": "whether the answer in what the arm decodes is right; where problems have answers",
    "f1": "overlap of its words with those of the best answer; where problems have answers",
    "kept_bytes": "most bytes of KV cache held at once along the forced text",
    "step_seconds": "seconds of a decoding step, median over the steps of a text",
}
"""What `compare` measures of each text or problem."""

HIGHER_IS_BETTER = frozenset({"accuracy", "f1", "agreement"})

DENSE = "dense"


@torch.no_grad()
def compare(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts_or_problems: Sequence[str] | Sequence[Problem],
    policies: Sequence[Policy] | Mapping[str, Policy],
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 256,
    final: Callable[[str], str] = final_answer,
    progress: bool = True,
    seed: int = 0,
) -> Comparison:
    """Decode along every text or problem with dense attention and under each policy.

    Dense is the model's own forward and `DynamicCache`. Every arm sees the same ids: the prompt in
    one forward, then one token a step, forced, as a policy sees them in `generate`. Of a text the
    first tokens are the prompt and the rest is forced. Of a problem its continuation is forced, or
    else what dense decodes; where problems have answers, every arm also decodes one by itself,
    greedily (the likeliest token, whatever the `generation_config`).

    The logits of dense are kept while its text is worked on, as the model gives them: in fp32
    200 MB for 1,000 tokens of a vocabulary of 50,000. All that is measured is computed in fp64
    from one token's at a time.

    Args:
        model: as for `SparseCache`; afterwards it is attached, or not, as it was before.
        tokenizer: of the model; its chat template is used for problems, if it has one.
        texts_or_problems: texts, or `Problem`s; one at a time, without batches.
        policies: what to compare, named by their repr; or a mapping that gives names.
        prompt_tokens: how many first tokens of a text are its prompt.
        new_tokens: how many tokens are decoded for a problem, at most.
        final: finds in a decoded text the part that is held against the answers; see
            `sparsity.problem.final_answer` and `is_right`.
        progress: whether to show a bar, where tqdm is installed.
        seed: of the intervals.

    Returns:
        A `Comparison` with the metrics of `METRICS`, dense first. What was decoded for answers
        stands in its `settings["decoded"]`, by arm.

    Raises:
        SparsityError: no texts, no policies, two arms of one name, a text shorter than its prompt
            and two tokens or longer than the model's positions, answers to some problems only, a
            policy that cannot serve the model or whose budget the prompt fills; before anything
            runs.
    """
    prompt_tokens = whole_number("prompt_tokens", prompt_tokens, least=1)
    new_tokens = whole_number("new_tokens", new_tokens, least=1)
    seed = whole_number("seed", seed, least=0)
    if not callable(final):
        raise SparsityError(f"final is {described(final)}: expected a function of a text")
    arms = _named(policies)
    unit, tasks = _tasks(texts_or_problems, tokenizer, prompt_tokens, new_tokens)
    from sparsity.hf.attach import decoder_of, keep_attached
    from sparsity.hf.cache import SparseCache
    from sparsity.hf.forward_checks import check_call

    decoder = decoder_of(model)
    if not model.can_generate():
        raise SparsityError(
            f"{type(model).__name__} does not generate text, so there is nothing to compare: load "
            "the model with AutoModelForCausalLM"
        )
    check_call(decoder, {})
    _check_lengths(tasks, unit, getattr(decoder.config, "max_position_embeddings", None))
    with keep_attached(model):
        caches = {name: SparseCache(model, policy) for name, policy in arms.items()}
        for name, cache in caches.items():
            _check_room(name, cache, tasks, unit)
        values, decoded = _measured(model, tokenizer, tasks, caches, final, progress)
    settings: dict[str, Any] = {
        "model": model.name_or_path,
        "policies": {name: repr(policy) for name, policy in arms.items()},
        "prompt_tokens": [len(task.prompt) for task in tasks],
        "seed": seed,
    }
    if unit == "problem":
        settings["new_tokens"] = new_tokens
        if tasks[0].answers:
            settings["decoded"] = decoded
    arrays = {n: {m: np.array(v) for m, v in found.items()} for n, found in values.items()}
    return Comparison(arrays, f"{unit}s", HIGHER_IS_BETTER, settings, seed)


class _Task(NamedTuple):
    """One text or problem in token ids.

    prompt: fed at once. target: fed one by one; None for what dense decodes. most: how many tokens
    are decoded; 0 for none. answers: that are right.
    """

    prompt: list[int]
    target: list[int] | None
    most: int = 0
    answers: tuple[str, ...] = ()


def _measured(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[_Task],
    caches: "dict[str, SparseCache]",
    final: Callable[[str], str],
    progress: bool,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[str]]]:
    """By arm: the values of each metric, and what was decoded for problems with answers."""
    stop = _stop_tokens(model, tokenizer)
    values: dict[str, dict[str, list[float]]] = {name: {} for name in (DENSE, *caches)}
    decoded: dict[str, list[str]] = {name: [] for name in values}
    runs = ((task, name, run) for task in tasks for name, run in _runs(model, task, caches, stop))
    for task, name, run in _bar(runs, len(tasks) * len(values), progress):
        numbers = {"extra_nll": run.extra_nll, "kl": run.kl, "agreement": run.agreement}
        if task.answers:
            text = str(tokenizer.decode(run.decoded, skip_special_tokens=True))
            decoded[name].append(text)
            numbers |= _marks(final(text), task.answers)
        numbers |= {"kept_bytes": float(run.kept_bytes), "step_seconds": run.step_seconds}
        for metric, value in numbers.items():
            values[name].setdefault(metric, []).append(value)
    return values, decoded


def _runs(
    model: "PreTrainedModel",
    task: _Task,
    caches: "dict[str, SparseCache]",
    stop: frozenset[int],
) -> "Iterator[tuple[str, DenseRun | PolicyRun]]":
    """Dense, and then each policy, along one text; the logits of dense are gone at the end."""
    from sparsity.hf.decoding import run_dense, run_policy

    prompt = torch.tensor(task.prompt, device=model.device)
    target = None if task.target is None else torch.tensor(task.target, device=model.device)
    with _detached(model):
        dense = run_dense(model, prompt, target, task.most, stop)
    yield DENSE, dense
    for name, cache in caches.items():
        yield name, run_policy(model, cache, prompt, dense, task.most if task.answers else 0, stop)
        cache.reset()


def _marks(said: str, answers: tuple[str, ...]) -> dict[str, float]:
    return {
        "accuracy": max(is_right(said, answer) for answer in answers),
        "f1": max(overlap(said, answer) for answer in answers),
    }


@contextmanager
def _detached(model: "PreTrainedModel") -> Iterator[None]:
    """The model's own attention for a while; caches made before go on working afterwards."""
    from sparsity.hf.attach import attach, detach

    detach(model)
    try:
        yield
    finally:
        attach(model)


def _named(policies: Sequence[Policy] | Mapping[str, Policy]) -> dict[str, Policy]:
    """Policies by name, each name once."""
    if isinstance(policies, Mapping):
        pairs = list(policies.items())
    elif isinstance(policies, list | tuple):
        pairs = [(repr(policy), policy) for policy in policies]
    else:
        raise SparsityError(
            f"policies is {described(policies)}: expected a list of policies, or a mapping of "
            "names to policies"
        )
    arms: dict[str, Policy] = {}
    for name, policy in pairs:
        if not isinstance(policy, Policy):
            raise SparsityError(
                f"{described(policy)} is no policy: give one such as RaaS(budget=1024)"
            )
        if not isinstance(name, str):
            raise SparsityError(f"the name {name!r} of {policy!r} is no text")
        if name in arms or name == DENSE:
            raise SparsityError(f"two arms are named {name!r}: give a mapping of names to policies")
        arms[name] = policy
    if not arms:
        raise SparsityError("policies is empty: dense has nothing to be compared with")
    return arms


def _tasks(
    given: Sequence[str] | Sequence[Problem],
    tokenizer: "PreTrainedTokenizerBase",
    prompt_tokens: int,
    new_tokens: int,
) -> tuple[str, list[_Task]]:
    """What the numbers are of, "text" or "problem", and each of them in token ids."""
    if not isinstance(given, list | tuple) or not given:
        raise SparsityError(
            f"texts_or_problems is {described(given)}: expected a list of at least one text or "
            "sparsity.Problem"
        )
    kind, unit = (Problem, "problem") if isinstance(given[0], Problem) else (str, "text")
    tasks = []
    for index, one in enumerate(given):
        if not isinstance(one, kind):
            raise SparsityError(
                f"{unit} {index} is {described(one)}: expected texts only or Problems only, each "
                "on its own, without batches"
            )
        if isinstance(one, Problem):
            if bool(one.answers) != bool(given[0].answers):
                raise SparsityError(
                    f"problem {index} has {len(one.answers)} answers and problem 0 "
                    f"{len(given[0].answers)}: give answers to all problems or to none"
                )
            tasks.append(_of_problem(one, tokenizer, new_tokens))
            continue
        ids = list(tokenizer(one)["input_ids"])
        if len(ids) < prompt_tokens + 2:
            raise SparsityError(
                f"text {index} has {len(ids)} tokens, fewer than prompt_tokens + 2 = "
                f"{prompt_tokens + 2}: give longer texts or a smaller prompt_tokens"
            )
        tasks.append(_Task(ids[:prompt_tokens], ids[prompt_tokens:]))
    return unit, tasks


def _of_problem(problem: Problem, tokenizer: Any, new_tokens: int) -> _Task:
    target = None
    if problem.continuation is not None:
        target = list(tokenizer(problem.continuation, add_special_tokens=False)["input_ids"])
    most = new_tokens if problem.answers or target is None else 0
    return _Task(prompt_ids(problem, tokenizer), target, most, problem.answers)


def _check_lengths(tasks: Sequence[_Task], unit: str, limit: int | None) -> None:
    for index, task in enumerate(tasks):
        for part, ids in (("prompt", task.prompt), ("continuation", task.target)):
            if ids is not None and not ids:
                raise SparsityError(
                    f"the {part} of {unit} {index} has no tokens: give a text that the tokenizer "
                    "makes tokens of"
                )
        count = len(task.prompt) + max(len(task.target or ()), task.most)
        if limit is not None and count > limit:
            raise SparsityError(
                f"{unit} {index} needs {count} tokens and the model has {limit} positions: give "
                f"shorter {unit}s" + (" or fewer new_tokens" if task.most else "")
            )


def _check_room(name: str, cache: "SparseCache", tasks: Sequence[_Task], unit: str) -> None:
    """Refuse a policy whose pinned pages would fill its budget half way through a text."""
    policy = cache.policy
    if not any(layer >= policy.dense_layers for layer in cache.retentions):
        return  # it decides in no layer
    for index, task in enumerate(tasks):
        step = plan(BatchRows(), policy, 1, len(task.prompt), None, torch.device("cpu"))
        room, steps = step.then.room, max(len(task.target or ()), task.most)
        if room is not None and room < steps:
            raise SparsityError(
                f"{name!r} pins the {len(task.prompt)} tokens of the prompt of {unit} {index}, and "
                f"its budget of {policy.budget} has room for {room} of the {steps} behind it: "
                "raise the budget, or use pin_prompt=False"
            )


def _stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Ids behind which nothing is decoded: those of the model, else that of the tokenizer."""
    config: Any = model.generation_config
    found = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found) if isinstance(found, list) else frozenset({int(found)})


def _bar(runs: Iterable[T], total: int, progress: bool) -> Iterable[T]:
    """The runs, with a bar where one is wanted and tqdm is there."""
    if not progress:
        return runs
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return runs
    return tqdm(runs, desc="texts under policies", total=total)
