"""Link methods against full prefill, on the same questions about the same documents."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from picache.answers import begins, f1
from picache.arguments import whole_number
from picache.arms_linker import ArmsLinker
from picache.comparison import Comparison
from picache.errors import PICacheError
from picache.methods import FullRecompute
from picache.methods.base import LinkMethod
from picache.methods.presets import Arm
from picache.pic import PIC
from picache.problem import Problem, answer_ids, check_problems, pieces
from picache.sweep import checked_workers, spread
from picache.text_ids import ids_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from picache.hf.decoding import Answered

METRICS = {
    "accuracy": "whether the greedy answer begins with an answer; where problems have answers",
    "f1": "overlap of its words with those of the best answer; where problems have answers",
    "nll": "nats a token of the first answer, teacher-forced",
    "extra_nll": "the same above full prefill",
    "kl": "KL(full || arm) in nats, mean over the answer's tokens",
    "agreement": "share of the answer's tokens that full prefill finds likeliest and the arm too",
    "recomputed": "share of the prompt's tokens that went through the layers, mean over layers",
    "operations": "floating-point operations of the prompt as a share of full prefill's, estimated",
    "first_token_seconds": "seconds to the logits of the first new token, chunks compiled before",
}
"""What `compare` measures of each problem."""

HIGHER_IS_BETTER = frozenset({"accuracy", "f1", "agreement"})

DRAWN = ("recomputed", "extra_nll")

SECONDS = "first_token_seconds"

FULL = "full"


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
    together: int = 1,
    pic: PIC | None = None,
    workers: int | str = 1,
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
        together: how many problems are compiled and linked at once. On a GPU that is faster, most
            of all for problems that are about as long; first_token_seconds, which is of a prompt
            alone, is then left out.
        pic: what to link by, with chunks compiled and passes captured before; by default a new one.
        workers: how many processes work at once, by joblib, or a Ray cluster, "ray://HOST:PORT":
            see `picache.sweep.spread`. Each holds a copy of the model, which must be on the CPU,
            and counts as many threads as this process (`torch.set_num_threads`), for the same
            numbers to the last bit. first_token_seconds, which others at work would change, is left
            out.

    Returns:
        A `Comparison` with the metrics of `METRICS`, full prefill first. Its settings hold the
        tokens of each prompt and the greedy answers: `settings["decoded"]`, by arm.

    Raises:
        PICacheError: no problems, answers to some of them only or longer than new_tokens, a metric
            that needs answers where there are none or problems alone where they are not, no
            methods, two arms of one name, some arms that keep the BOS of chunks and some that do
            not, a prompt longer than the model's positions, a pic of another model or tokenizer or
            one that may prefill in full, workers beside a pic or for a model that is not on the
            CPU; before anything runs. Later, with a note that says of which problem, what a worker
            raised.
    """
    check_problems(problems)
    arms = _named(methods)
    together = whole_number("compare needs a whole number of problems together", together, least=1)
    workers = _checked(workers, model, pic)
    wanted = _wanted(metrics, bool(problems[0].answers), together == 1 and workers == 1)
    new_tokens = whole_number("compare needs a whole number of new_tokens", new_tokens, least=1)
    seed = whole_number("compare needs a whole number as its seed", seed, least=0)
    _check_lengths(model, tokenizer, problems, new_tokens)
    if pic is not None:
        _check_pic(pic, model, tokenizer)
    own = pic is None
    pic = PIC(model, tokenizer, flops_per_byte=None) if pic is None else pic
    linker = ArmsLinker(pic, tokenizer, arms, own)  # refuses arms that this model does not serve
    groups = _Groups(model, tokenizer, arms, new_tokens, linker if workers == 1 else None)
    values: dict[str, dict[str, list[float]]] = {name: {} for name in (FULL, *arms)}
    decoded: dict[str, list[str]] = {name: [] for name in values}
    prompt_tokens: list[int] = []
    starts = range(0, len(problems), together)
    cells = [(start, problems[start : start + together]) for start in starts]
    what = f"full prefill and {len(arms)} methods"
    with closing(
        spread(groups, cells, workers, named=_which, what=what, progress=progress)
    ) as found:
        for tokens, by_arm in found:
            prompt_tokens += tokens
            for name, (rows, texts) in by_arm.items():
                decoded[name] += texts
                for row in rows:
                    for metric, value in row.items():
                        values[name].setdefault(metric, []).append(value)
    arrays = {n: {m: np.array(of[m]) for m in wanted} for n, of in values.items()}
    settings: dict[str, Any] = {"model": model.name_or_path, "new_tokens": new_tokens, "seed": seed}
    settings |= {"prompt_tokens": prompt_tokens, "decoded": decoded}
    settings["storage"] = pic.store.storage
    drawn = DRAWN if set(DRAWN) <= set(wanted) else None
    return Comparison(arrays, "problems", HIGHER_IS_BETTER, settings, seed, drawn)


class _Groups:
    """Answers a group of problems under all arms.

    Args:
        model: answers.
        tokenizer: of the model.
        arms: by name.
        new_tokens: of an answer.
        linker: links the prompts; in another process, which this is sent to, one of its own.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        arms: dict[str, Arm],
        new_tokens: int,
        linker: ArmsLinker | None,
    ) -> None:
        self._model, self._tokenizer, self._arms = model, tokenizer, arms
        self._new_tokens, self._linker = new_tokens, linker
        self._threads = torch.get_num_threads()

    @torch.no_grad()
    def __call__(
        self, cell: tuple[int, Sequence[Problem]]
    ) -> tuple[list[int], dict[str, tuple[list[dict[str, float]], list[str]]]]:
        """Tokens of the prompts; of every arm, what was measured of each problem, and answers."""
        from picache.hf.decoding import answers  # transformers is loaded with the model

        start, group = cell
        model, tokenizer = self._model, self._tokenizer
        if self._linker is None:
            torch.set_num_threads(self._threads)
            pic = PIC(model, tokenizer, flops_per_byte=None)
            self._linker = ArmsLinker(pic, tokenizer, self._arms, own=True)
        targets = None
        if group[0].answers:
            ids = (answer_ids(problem, tokenizer) for problem in group)
            targets = [torch.tensor(one, device=model.device) for one in ids]
        stop = _stop_tokens(model, tokenizer)
        found = answers(model, self._linker.prompts(start, group), self._new_tokens, stop, targets)
        full = next(found)
        if targets is None:
            targets = [one.tokens for one in full]
        by_arm = {}
        for name, answered in zip((FULL, *self._arms), chain([full], found), strict=True):
            rows, texts = [], []
            for problem, ours, reference, target in zip(
                group, answered, full, targets, strict=True
            ):
                text = str(tokenizer.decode(ours.tokens, skip_special_tokens=True))
                texts.append(text)
                rows.append(_measured(problem, ours, reference, target, text))
            by_arm[name] = rows, texts
        return self._linker.prompt_tokens[-len(group) :], by_arm


def _which(cell: tuple[int, Sequence[Problem]]) -> str:
    """A group of problems, by number."""
    start, group = cell
    return (
        f"problem {start}" if len(group) == 1 else f"problems {start} to {start + len(group) - 1}"
    )


def _measured(
    problem: Problem, arm: "Answered", full: "Answered", target: Tensor, answer: str
) -> dict[str, float]:
    """What an arm measures, held against full prefill."""
    ours, reference = arm.log_probabilities, full.log_probabilities
    likelihoods = [-one.gather(1, target[:, None]).mean() for one in (ours, reference)]
    kl = (reference.exp() * (reference - ours)).sum(-1).mean()
    agreement = (ours.argmax(-1) == reference.argmax(-1)).double().mean()
    # Read back once: each time a device is waited for.
    nll, own, divergence, agreed = torch.stack([*likelihoods, kl, agreement]).tolist()
    measured = {}
    if problem.answers:
        measured = {
            "accuracy": max(map(partial(begins, answer), problem.answers)),
            "f1": max(map(partial(f1, answer), problem.answers)),
        }
    return measured | {
        "nll": nll,
        "extra_nll": nll - own,
        "kl": divergence,
        "agreement": agreed,
        "recomputed": arm.recomputed,
        "operations": arm.operations,
        "first_token_seconds": arm.seconds,
    }


def _checked(workers: object, model: "PreTrainedModel", pic: PIC | None) -> int | str:
    """Who works; refused where the work cannot be sent to others."""
    found = checked_workers(workers)
    if found == 1:
        return found
    if pic is not None:
        raise PICacheError(
            f"workers={workers!r} and a pic are given, and its chunks and passes are of this "
            "process: leave out one of them"
        )
    if model.device.type != "cpu":
        raise PICacheError(
            f"workers={workers!r} would copy a model on {model.device} into every worker: move it "
            "to the CPU, or start a process a device, as examples/experiments/link_evidence.py does"
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
        raise PICacheError(f"metrics must be a list of names, got {metrics!r}")
    for name in metrics:
        if name not in METRICS:
            raise PICacheError(f"there is no metric {name!r}; there are {', '.join(METRICS)}")
        if name == SECONDS and not alone:
            raise PICacheError(
                f"{name!r} is of a prompt linked alone: leave out together and workers"
            )
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


def _check_pic(pic: PIC, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a PIC that would not link what is compared."""
    if pic.model is not model or pic.tokenizer is not tokenizer:
        raise PICacheError(
            "the pic is of another model or tokenizer than those compared: give PIC(model, "
            "tokenizer, flops_per_byte=None) of the same two"
        )
    if pic.sinks != "drop":
        raise PICacheError(
            f"the pic has sinks={pic.sinks!r}, and arms say themselves what chunks are compiled "
            "behind: give PIC(model, tokenizer, flops_per_byte=None), and Arm(method, sinks)"
        )
    if pic.flops_per_byte is not None:
        raise PICacheError(
            f"the pic has flops_per_byte={pic.flops_per_byte!r}, by which it would prefill in full "
            "where linking costs as much: arms that are compared link whatever it costs, so give "
            "PIC(..., flops_per_byte=None)"
        )


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
