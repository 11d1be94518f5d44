"""Retention policies against dense attention, along the same tokens."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsity.arguments import described, whole_number
from sparsity.comparison import Comparison
from sparsity.errors import SparsityError
from sparsity.policies.base import Policy
from sparsity.problem import Problem, final_answer, is_right, overlap
from sparsity.retention.batch_rows import BatchRows, plan
from sparsity.sweep import bar, checked_workers, spread
from sparsity.tasks import Task, batches_of, check_lengths, steps_of, tasks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsity.hf.cache import SparseCache
    from sparsity.hf.decoding import Run

METRICS = {
    "extra_nll": "nats a token of the forced text above dense",
    "kl": "KL(dense || arm) in nats, mean over the tokens of the forced text",
    "agreement": "share of those tokens at which dense and the arm find the same word likeliest",
    "accuracy": "whether the answer in what the arm decodes is right; where problems have answers",
    "f1": "overlap of its words with those of the best answer; where problems have answers",
    "kept_bytes": "most bytes of KV cache at once along the forced text: of its batch, by rows",
    "step_seconds": "seconds of a decoding step of the batch, median over the steps of a text",
}
"""What `compare` measures of each text or problem."""

HIGHER_IS_BETTER = frozenset({"accuracy", "f1", "agreement"})

DRAWN = ("kept_bytes", "extra_nll")

SECONDS = "step_seconds"

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
    batch_size: int = 1,
    final: Callable[[str], str] = final_answer,
    right: Callable[[str, str], float] = is_right,
    metrics: Sequence[str] | None = None,
    workers: int | str = 1,
    progress: bool = True,
    seed: int = 0,
) -> Comparison:
    """Decode along every text or problem with dense attention and under each policy.

    Dense is the model's own forward and `DynamicCache`. Every arm sees the same ids: the prompt in
    one forward, then one token a step, forced, as a policy sees them in `generate`. Of a text the
    first tokens are the prompt and the rest is forced. Of a problem its continuation is forced, or
    else what dense decodes; where problems have answers, every arm also decodes one by itself,
    greedily (the likeliest token, whatever the `generation_config`).

    Texts of like length go through together, `batch_size` at a time, prompts padded on the left.
    Policies decide for each row by itself (of `Random`, rows share the random numbers, as texts one
    at a time do), so that distances and answers are those of one at a time, but for rounding: a
    matrix product of other shapes adds up in another order. A batch goes on to its longest text;
    of rows that have ended nothing more counts. `kept_bytes` is what the batch holds, padding
    included, divided by its rows, and `step_seconds` the step of the batch: all its rows report the
    same, so that the intervals of these two are too narrow.

    The logits of dense are kept while its batch is worked on, as the model gives them: in fp32
    200 MB for each row of 1,000 tokens of a vocabulary of 50,000. All that is measured is computed
    in fp64 from one step's at a time.

    Args:
        model: as for `SparseCache`; afterwards it is attached, or not, as it was before.
        tokenizer: of the model; its chat template is used for problems, if it has one.
        texts_or_problems: texts, or `Problem`s, each on its own.
        policies: what to compare, each named by its class and by what it has other than the
            defaults: "RaaS(budget=1024)". Or a mapping that gives names.
        prompt_tokens: how many first tokens of a text are its prompt.
        new_tokens: how many tokens are decoded for a problem, at most.
        batch_size: how many texts or problems are worked on together, at most.
        final: finds in a decoded text the part that is held against the answers; see
            `sparsity.problem.final_answer`.
        right: 1 where that part is an answer, else 0; see `sparsity.problem.is_right`, and for
            LaTeX `sparsity.grader.same_value`.
        metrics: which of `METRICS` to measure, so that one that needs answers is refused where
            there are none; by default all that can be.
        workers: how many processes work at once, by joblib, or a Ray cluster, "ray://HOST:PORT":
            see `sparsity.sweep.spread`. Each holds a copy of the model, which must be on the CPU,
            and counts as many threads as this process (`torch.set_num_threads`), for the same
            numbers to the last bit. step_seconds, which others at work would change, are left out.
        progress: whether to show a bar, where tqdm is installed.
        seed: of the intervals.

    Returns:
        A `Comparison` with the metrics of `METRICS`, dense first. What was decoded for answers
        stands in its `settings["decoded"]`, by arm.

    Raises:
        SparsityError: no texts, no policies, two arms of one name, a text shorter than its prompt
            and two tokens or longer than the model's positions, answers to some problems only, a
            policy that cannot serve the model or whose budget the prompt fills, either of them
            perhaps only where a batch goes on to its longest, workers for a model that is not on
            the CPU; before anything runs. Later, with a note that says of which text or problem,
            what a worker raised.
    """
    prompt_tokens = whole_number("prompt_tokens", prompt_tokens, least=1)
    new_tokens = whole_number("new_tokens", new_tokens, least=1)
    batch_size = whole_number("batch_size", batch_size, least=1)
    seed = whole_number("seed", seed, least=0)
    if not callable(final):
        raise SparsityError(f"final is {described(final)}: expected a function of a text")
    if not callable(right):
        raise SparsityError(f"right is {described(right)}: expected a function of two texts")
    workers = _checked(workers, model)
    arms = _named(policies)
    unit, tasks = tasks_of(texts_or_problems, tokenizer, prompt_tokens, new_tokens)
    wanted = _wanted(metrics, bool(tasks[0].answers), workers == 1)
    batches = batches_of(tasks, batch_size)
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
    check_lengths(tasks, batches, unit, getattr(decoder.config, "max_position_embeddings", None))
    with keep_attached(model):
        caches = {name: SparseCache(model, arm, static=False) for name, arm in arms.items()}
        for name, cache in caches.items():
            _check_room(name, cache, tasks, batches, unit)
        task = _Batches(model, tokenizer, arms, final, right)
        cells = [(batch, [tasks[i] for i in batch]) for batch in batches]
        if workers == 1:
            values, decoded = _joined(_one_by_one(task, cells, caches, progress), tasks, batches)
        else:

            def named(cell: tuple[Sequence[int], Sequence[Task]]) -> str:
                return f"{unit} " + ", ".join(map(str, cell[0]))

            spreading = spread(task, cells, workers, named=named, what="batches", progress=progress)
            with _detached(model), closing(spreading) as done:  # workers attach copies of their own
                values, decoded = _joined(done, tasks, batches)
    settings: dict[str, Any] = {
        "model": model.name_or_path,
        "policies": {name: repr(policy) for name, policy in arms.items()},
        "prompt_tokens": [len(task.prompt) for task in tasks],
        "batch_size": batch_size,
        "seed": seed,
    }
    if unit == "problem":
        settings["new_tokens"] = new_tokens
        if tasks[0].answers:
            settings["decoded"] = decoded
    arrays = {n: {m: np.array(of[m]) for m in wanted} for n, of in values.items()}
    drawn = DRAWN if set(DRAWN) <= set(wanted) else None
    return Comparison(arrays, f"{unit}s", HIGHER_IS_BETTER, settings, seed, drawn)


ByArm = dict[str, list[tuple[dict[str, float], str]]]
"""Of every arm, for each task of a batch: what was measured, and what was decoded."""


def _joined(
    found: Iterable[ByArm], tasks: Sequence[Task], batches: Sequence[Sequence[int]]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[str]]]:
    """By arm, in the order of the tasks: each metric, and what was decoded where there are answers.

    Args:
        found: of each batch.
        tasks: texts or problems.
        batches: the numbers of the tasks that are worked on together.
    """
    numbers: dict[str, dict[int, dict[str, float]]] = {}
    decoded: dict[str, dict[int, str]] = {}
    for batch, by_arm in zip(batches, found, strict=True):
        for name, rows in by_arm.items():
            for index, (measured, text) in zip(batch, rows, strict=True):
                numbers.setdefault(name, {})[index] = measured
                if tasks[index].answers:
                    decoded.setdefault(name, {})[index] = text
    values = {
        name: {metric: [of[i][metric] for i in range(len(tasks))] for metric in of[0]}
        for name, of in numbers.items()
    }
    return values, {name: [of[i] for i in sorted(of)] for name, of in decoded.items()}


def _one_by_one(
    task: "_Batches",
    cells: Sequence[tuple[Sequence[int], Sequence[Task]]],
    caches: "dict[str, SparseCache]",
    progress: bool,
) -> Iterator[ByArm]:
    """In this process, with a bar of the arms of every batch."""
    with bar(len(cells) * (1 + len(caches)), "batches under policies", progress) as advance:
        for _, batch in cells:
            by_arm = {}
            for name, rows in task.runs(batch, caches):
                by_arm[name] = rows
                advance()
            yield by_arm


class _Batches:
    """Decodes a batch with dense attention and under every policy.

    Args:
        model: as for `compare`.
        tokenizer: of the model.
        arms: policies by name.
        final: see `compare`.
        right: see `compare`.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        arms: Mapping[str, Policy],
        final: Callable[[str], str],
        right: Callable[[str, str], float],
    ) -> None:
        self.arms = arms
        self._model, self._tokenizer = model, tokenizer
        self._final, self._right = final, right
        self._threads = torch.get_num_threads()

        self._caches: dict[str, SparseCache] = {}

    @torch.no_grad()
    def __call__(self, cell: tuple[Sequence[int], Sequence[Task]]) -> ByArm:
        """In another process, which this was sent to: with caches of its own."""
        if not self._caches:
            from sparsity.hf.cache import SparseCache

            torch.set_num_threads(self._threads)
            self._caches = {
                name: SparseCache(self._model, arm, static=False) for name, arm in self.arms.items()
            }
        return dict(self.runs(cell[1], self._caches))

    def runs(
        self, batch: Sequence[Task], caches: "dict[str, SparseCache]"
    ) -> Iterator[tuple[str, list[tuple[dict[str, float], str]]]]:
        """An arm at a time."""
        stop = _stop_tokens(self._model, self._tokenizer)
        for name, rows in _runs(self._model, batch, caches, stop):
            yield name, [self._row(task, run) for task, run in zip(batch, rows, strict=True)]

    def _row(self, task: Task, run: "Run") -> tuple[dict[str, float], str]:
        numbers = {"extra_nll": run.extra_nll, "kl": run.kl, "agreement": run.agreement}
        text = ""
        if task.answers:
            text = str(self._tokenizer.decode(run.decoded, skip_special_tokens=True))
            said = self._final(text)
            numbers["accuracy"] = max(float(self._right(said, one)) for one in task.answers)
            numbers["f1"] = max(overlap(said, one) for one in task.answers)
        return numbers | {"kept_bytes": run.kept_bytes, "step_seconds": run.step_seconds}, text


def _runs(
    model: "PreTrainedModel",
    tasks: Sequence[Task],
    caches: "dict[str, SparseCache]",
    stop: frozenset[int],
) -> "Iterator[tuple[str, list[Run]]]":
    """Dense, and then each policy, along one batch; the logits of dense are gone at the end."""
    from sparsity.hf.decoding import End, run_dense, run_policy

    prompts = [task.prompt for task in tasks]
    known = [task.target for task in tasks if task.target is not None]
    with _detached(model):
        forced, runs = run_dense(model, prompts, known or None, End(tasks[0].most, stop))
    yield DENSE, runs
    end = End(tasks[0].most if tasks[0].answers else 0, stop)
    for name, cache in caches.items():
        yield name, run_policy(model, cache, prompts, forced, end)
        cache.reset()


@contextmanager
def _detached(model: "PreTrainedModel") -> Iterator[None]:
    """The model's own attention for a while; caches made before go on working afterwards."""
    from sparsity.hf.attach import attach, detach

    detach(model)
    try:
        yield
    finally:
        attach(model)


def _name(policy: Any) -> str:
    """Class of a policy, and what it has other than the defaults."""
    if not is_dataclass(policy) or isinstance(policy, type):
        return repr(policy)
    given = [(field, getattr(policy, field.name)) for field in fields(policy) if field.init]
    shown = [f"{field.name}={value!r}" for field, value in given if value != field.default]
    return f"{type(policy).__name__}({', '.join(shown)})"


def _checked(workers: object, model: "PreTrainedModel") -> int | str:
    """Who works; refused where a model would be copied from a device."""
    found = checked_workers(workers)
    if found != 1 and model.device.type != "cpu":
        raise SparsityError(
            f"workers={workers!r} would copy a model on {model.device} into every worker: move it "
            "to the CPU, or start a process a device, as examples/experiments/retention_evidence.py"
            " does"
        )
    return found


def _wanted(metrics: Sequence[str] | None, answered: bool, alone: bool) -> list[str]:
    """The metrics asked for, which can be measured; in the order of `METRICS`."""
    known = [name for name in METRICS if answered or name not in ("accuracy", "f1")]
    if not alone:
        known.remove(SECONDS)
    if metrics is None:
        return known
    if isinstance(metrics, str) or not metrics:
        raise SparsityError(f"metrics must be a list of names, got {metrics!r}")
    for name in metrics:
        if name not in METRICS:
            raise SparsityError(f"there is no metric {name!r}; there are {', '.join(METRICS)}")
        if name == SECONDS and not alone:
            raise SparsityError(
                f"{name!r} are of a machine that does nothing else: leave out workers"
            )
        if name not in known:
            raise SparsityError(f"{name!r} needs answers: give them, or leave it out")
    return [name for name in known if name in metrics]


def _named(policies: Sequence[Policy] | Mapping[str, Policy]) -> dict[str, Policy]:
    """Policies by name, each name once."""
    if isinstance(policies, Mapping):
        pairs = list(policies.items())
    elif isinstance(policies, list | tuple):
        pairs = [(_name(policy), policy) for policy in policies]
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


def _check_room(
    name: str,
    cache: "SparseCache",
    tasks: Sequence[Task],
    batches: Sequence[Sequence[int]],
    unit: str,
) -> None:
    """Refuse a policy whose pinned pages would fill its budget half way through a batch."""
    policy = cache.policy
    if not any(layer >= policy.dense_layers for layer in cache.retentions):
        return  # it decides in no layer
    steps = steps_of(tasks, batches)
    for index, task in enumerate(tasks):
        step = plan(BatchRows(), policy, 1, len(task.prompt), None, torch.device("cpu"))
        room = step.then.room
        if room is not None and room < steps[index]:
            raise SparsityError(
                f"{name!r} pins the {len(task.prompt)} tokens of the prompt of {unit} {index}, and "
                f"its budget of {policy.budget} has room for {room} of the {steps[index]} behind "
                f"it{task.of_batch(steps[index])}: raise the budget, or use pin_prompt=False"
            )


def _stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Ids behind which nothing is decoded: those of the model, else that of the tokenizer."""
    config: Any = model.generation_config
    found = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found) if isinstance(found, list) else frozenset({int(found)})
