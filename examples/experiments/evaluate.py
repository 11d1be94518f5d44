"""Measure the three packages on a model: the functions behind the quickstart's tables.

Each returns rows of plain numbers, ready for JSON. Times are medians over problems, all arms of one
problem one after the other in the same run, so that a noisy machine disturbs them alike.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from math import sqrt
from pathlib import Path

import numpy as np
import torch
import transformers
from reference_tasks import (
    LookupProblem,
    final_answer,
    lookup_problem,
    reasoning_problem,
)
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import demand
from picache import PIC, FullRecompute, LegoLink, LinkMethod, NaiveReuse, RandomRecompute
from sparsity import Full, Quest, RaaS, Random, SparseCache, StreamingLLM, detach

REFERENCE_MODEL = Path(__file__).parents[1] / "reference_model"
Row = dict[str, float | int | str | list[float]]


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in fp32 on CPU, in its own dtype on a GPU, and its tokenizer."""
    on_gpu = torch.cuda.is_available()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        name, dtype="auto" if on_gpu else torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    return model.to("cuda" if on_gpu else "cpu").eval(), tokenizer


@cache
def loaded(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load`, in silence and once in a process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return load(name)


def wilson_interval(right: int, problems: int) -> list[float]:
    """95 % interval of a proportion (Wilson), which stays inside [0, 1]."""
    z, share = 1.96, right / problems
    centre = share + z * z / (2 * problems)
    spread = z * sqrt(share * (1 - share) / problems + z * z / (4 * problems * problems))
    scale = 1 + z * z / problems
    return [max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)]


def first_token_seconds(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Seconds of a plain full prefill up to the logits of the first new token."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    with torch.no_grad():
        model(ids, logits_to_keep=1)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


LINK_ARMS: tuple[tuple[str, LinkMethod, bool], ...] = (  # name, method, chunks behind a BOS
    ("full", FullRecompute(), False),
    ("naive", NaiveReuse(), False),
    ("random-8", RandomRecompute(8), False),
    ("LegoLink-1", LegoLink(1), False),
    ("LegoLink-4", LegoLink(4), False),
    ("LegoLink-8", LegoLink(8), False),
    ("LegoLink-16", LegoLink(16), False),
    ("LegoLink-0, BOS dropped", LegoLink(0), True),
)


def cut(documents: tuple[str, ...], tokens: int) -> list[str]:
    """The documents' text in pieces of so many tokens, wherever they fall."""
    words = " ".join(documents).split()  # one word, one token
    return [" ".join(words[i : i + tokens]) for i in range(0, len(words), tokens)]


def linking(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: int,
    chunk_tokens: int = 24,
    long_documents: int = 112,
    seed: int = 2 * 10**9,
    progress: bool = True,
) -> list[Row]:
    """Accuracy, KL to full, recomputed tokens and time to first token of every arm, on lookups.

    The documents' text is cut into chunks of `chunk_tokens` tokens, wherever they fall, so that the
    meaning of many a chunk's beginning lies in the chunk before. Each is compiled alone and without
    a BOS unless the arm says so; the first chunk is the system line with the only BOS. "full"
    answers and its time are those of the model itself, a plain prefill without any cache. The long
    prompt is `long_documents` documents in one.
    """
    rng = random.Random(seed)
    pic = PIC(model, tokenizer, flops_per_byte=None)
    right = {name: 0 for name, *_ in LINK_ARMS}
    seconds: dict[str, list[float]] = {name: [] for name, *_ in LINK_ARMS}
    divergence: dict[str, list[float]] = {name: [] for name, *_ in LINK_ARMS}
    recomputed: dict[str, int] = {}
    total, full = 0.0, torch.empty(0)
    for _ in tqdm(range(problems), desc="linking", disable=not progress):
        problem = lookup_problem(rng)
        answer = tokenizer(problem.questions[0][1], add_special_tokens=False)["input_ids"][0]
        for name, method, bos in LINK_ARMS:
            prompt = _link(pic, problem, method, bos, chunk_tokens)
            computed = prompt.report.tokens_total if name == "full" else None
            computed = computed or prompt.report.tokens_recomputed
            recomputed[name] = recomputed.get(name, 0) + computed
            total += prompt.report.tokens_total / len(LINK_ARMS)
            linked = prompt.logits.double().log_softmax(-1)
            full = linked if name == "full" else full
            divergence[name].append(float((full.exp() * (full - linked)).sum()))
            if name == "full":
                seconds[name].append(first_token_seconds(model, prompt["input_ids"]))
                token = model.generate(prompt["input_ids"], max_new_tokens=1, do_sample=False)[
                    0, -1
                ]
            else:
                seconds[name].append(prompt.report.seconds["first_token"])
                token = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]
            right[name] += int(token == answer)
        pic.store.clear()
    long_seconds = _long_prompt_seconds(pic, model, long_documents, chunk_tokens, rng)
    return [
        {
            "arm": name,
            "accuracy": right[name] / problems,
            "interval": wilson_interval(right[name], problems),
            "problems": problems,
            "chunk_tokens": chunk_tokens,
            "prompt_tokens": total / problems,
            "kl_to_full": float(np.mean(divergence[name])),
            "tokens_recomputed": recomputed[name] / problems,
            "first_token_seconds": statistics.median(seconds[name]),
            **long_seconds[name],
        }
        for name, *_ in LINK_ARMS
    ]


def _link(pic: PIC, problem: LookupProblem, method: LinkMethod, bos: bool, chunk_tokens: int):
    prefix = f"{pic.tokenizer.bos_token} " if bos else ""
    texts = [problem.system, *(prefix + text for text in cut(problem.documents, chunk_tokens))]
    return pic.link([pic.compile(text) for text in texts], problem.query(), method)


def _long_prompt_seconds(
    pic: PIC, model: PreTrainedModel, documents: int, chunk_tokens: int, rng: random.Random
) -> dict[str, Row]:
    """Median of five, arms in turn; every chunk is in the store."""
    problem = lookup_problem(rng, documents)
    samples: dict[str, list[float]] = {name: [] for name, *_ in LINK_ARMS}
    tokens, rows = 0, {}
    for repeat in range(6):
        for name, method, bos in LINK_ARMS:
            prompt = _link(pic, problem, method, bos, chunk_tokens)
            tokens, rows[name] = prompt.report.tokens_total, prompt.report.tokens_recomputed
            spent = prompt.report.seconds["first_token"]
            if name == "full":
                rows[name] = tokens
                spent = first_token_seconds(model, prompt["input_ids"])
            if repeat:  # the first round warms up
                samples[name].append(spent)
    return {
        name: {
            "long_prompt_tokens": tokens,
            "long_tokens_recomputed": rows[name],
            "long_first_token_seconds": statistics.median(values),
        }
        for name, values in samples.items()
    }


def retention_arms(budget: int) -> tuple[tuple[str, Callable], ...]:
    """Policies at one budget in tokens, in every layer."""
    return (
        ("random", lambda: Random(budget)),
        ("StreamingLLM", lambda: StreamingLLM(budget)),
        ("Quest", lambda: Quest(budget, dense_layers=0)),
        ("RaaS", lambda: RaaS(budget)),
    )


def retention(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: int,
    budgets: Sequence[int],
    steps: int = 40,
    batch_size: int = 50,
    seed: int = 3 * 10**9,
    progress: bool = True,
) -> list[Row]:
    """Accuracy, peak KV bytes and milliseconds a token of every policy on the reasoning task.

    Every policy at every budget, and full attention once (its budget is written 0).
    """
    rng = random.Random(seed)
    chains = [reasoning_problem(rng, steps) for _ in range(problems)]
    longest = max(len(tokenizer(c.solution)["input_ids"]) for c in chains)
    rows: list[Row] = []
    arms = [("full", 0, lambda: Full())]
    arms += [(name, b, make) for b in budgets for name, make in retention_arms(b)]
    for name, budget, policy in tqdm(arms, desc="retention", disable=not progress):
        right = tokens = decoded = prompt_tokens = 0
        peak, seconds = 0.0, 0.0
        for first in range(0, problems, batch_size):
            batch = chains[first : first + batch_size]
            inputs = tokenizer(
                [c.prompt for c in batch],
                return_tensors="pt",
                padding=True,
                return_token_type_ids=False,
            ).to(model.device)
            cache = SparseCache(model, policy())
            width = inputs["input_ids"].shape[1]
            prompt_tokens += int(inputs["attention_mask"].sum())
            begun = time.perf_counter()
            out = model.generate(
                **inputs, past_key_values=cache, max_new_tokens=longest + 8, do_sample=False
            )
            seconds += time.perf_counter() - begun
            decoded += out.shape[1] - width
            texts = tokenizer.batch_decode(out[:, width:])
            right += sum(final_answer(t) == c.answer for t, c in zip(texts, batch, strict=True))
            tokens += sum(len(t.split(tokenizer.eos_token)[0].split()) for t in texts)
            peak = max(peak, cache.report().peak_bytes / len(batch))
        rows.append(
            {
                "arm": name,
                "accuracy": right / problems,
                "interval": wilson_interval(right, problems),
                "problems": problems,
                "budget": budget,
                "prompt_tokens": prompt_tokens / problems,
                "decoded_tokens": tokens / problems,
                "peak_kv_bytes": peak,
                "milliseconds_a_token": 1e3 * seconds / decoded,
                "batch_size": min(batch_size, problems),
            }
        )
    detach(model)
    return rows


SCHEDULERS = (
    demand.FCFS(),
    demand.RandomOrder(),
    demand.ClassMean(),
    demand.SERPT(),
    demand.Gittins(),
    demand.Oracle(),
)


def scheduling(jobs: int, seeds: Sequence[int], load: float, progress: bool = True) -> list[Row]:
    """Mean and P95 completion time in seconds, every policy on the same arrivals and sizes.

    Two workloads: the nine applications of the Hermes paper, each known to the scheduler as a
    PDGraph fitted on past runs, and a mix of bimodal demands, where the class mean says little.
    """
    mixes = {
        "hermes": demand.hermes_applications(),
        "bimodal": demand.bimodal_applications(),
    }
    rows: list[Row] = []
    with tqdm(
        total=len(mixes) * len(seeds) * len(SCHEDULERS), desc="scheduling", disable=not progress
    ) as bar:
        for mix, applications in mixes.items():
            results: dict[str, list] = {type(policy).__name__: [] for policy in SCHEDULERS}
            for seed in seeds:
                workload = demand.poisson_workload(applications, load, jobs, seed=seed)
                for policy in SCHEDULERS:
                    results[type(policy).__name__].append(demand.simulate(workload, policy))
                    bar.update()
            for name, runs in results.items():
                means = [run.mean for run in runs]
                tails = [run.quantile(0.95) for run in runs]
                first = results["FCFS"]
                rows.append(
                    {
                        "arm": name,
                        "mix": mix,
                        "load": load,
                        "jobs": jobs,
                        "seeds": len(seeds),
                        "mean_seconds": float(np.mean(means)),
                        "p95_seconds": float(np.mean(tails)),
                        "mean_to_fcfs": float(
                            np.mean([m / f.mean for m, f in zip(means, first, strict=True)])
                        ),
                        "p95_to_fcfs": float(
                            np.mean(
                                [t / f.quantile(0.95) for t, f in zip(tails, first, strict=True)]
                            )
                        ),
                    }
                )
    return rows
