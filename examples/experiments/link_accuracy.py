"""Answer accuracy and distance from full prefill against recomputed tokens, for every link method.

    python examples/experiments/link_accuracy.py --out docs/results

Lookups on the reference model, every arm on the same questions. Writes `link_accuracy.json`,
`link_accuracy.png`, and with --out docs/results the page docs/linking.md. Intervals are paired
bootstraps over questions: each resample draws the same questions for both arms.
"""

import argparse
import json
import random
import time
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from environment import environment
from evaluate import REFERENCE_MODEL, cut, loaded
from parallel import spread
from reference_tasks import LOOKUP_SYSTEM, LookupProblem, lookup_problem

from picache import (
    A3,
    APE,
    PIC,
    CacheBlend,
    ChunkStore,
    Combined,
    DummySinks,
    FullRecompute,
    LegoLink,
    LinkMethod,
    NaiveReuse,
    OracleDeviation,
    ProphetKV,
    RandomRecompute,
    SharedPrefix,
)

RATIOS = (0.05, 0.15, 0.3, 0.5)
Arm = tuple[str, str, LinkMethod]  # family, label, method


def method_arms() -> list[Arm]:
    """Every method over its budgets; random at LegoLink's tokens a chunk and at every ratio."""
    arms: list[Arm] = [
        ("full", "full", FullRecompute()),
        ("naive", "naive", NaiveReuse()),
        ("naive, query compiled alone", "naive, repo", NaiveReuse(force_query=False)),
    ]
    for k in (1, 2, 4, 8, 16):
        arms.append(("random", f"random-{k}", RandomRecompute(k)))
        arms.append(("LegoLink", f"LegoLink-{k}", LegoLink(k)))
    for ratio in RATIOS:
        percent = f"{100 * ratio:.0f}%"
        arms += [
            ("random, anywhere", f"random {percent}", RandomRecompute(ratio=ratio)),
            ("CacheBlend", f"CacheBlend {percent}", CacheBlend.paper(ratio)),
            ("CacheBlend, repo", f"CacheBlend repo {percent}", CacheBlend.repo(ratio)),
            ("CacheBlend, LMCache", f"CacheBlend lmcache {percent}", CacheBlend.lmcache(ratio)),
            ("A3", f"A3 {percent}", A3(ratio)),
            ("ProphetKV", f"ProphetKV {percent}", ProphetKV(ratio)),
            ("ProphetKV, value norm", f"ProphetKV norm {percent}", ProphetKV(ratio, True)),
            ("oracle deviation", f"oracle {percent}", OracleDeviation(ratio)),
            (
                "LegoLink-2 + ProphetKV",
                f"LegoLink-2 + ProphetKV {percent}",
                Combined((LegoLink(2), ProphetKV(1.0)), ratio),
            ),
        ]
    return arms


def control(family: str, label: str) -> str | None:
    """The random arm of the same budget; None for arms without one, and random itself."""
    if family == "LegoLink":
        return label.replace("LegoLink-", "random-")
    if family.startswith("random") or not label.endswith("%"):
        return None
    return f"random {label.rpartition(' ')[2]}"


def sink_arms() -> list[tuple[str, object, bool]]:
    """What chunks are compiled behind: label, policy, whether documents begin with a BOS."""
    return [
        ("nothing", "drop", False),
        ("BOS, dropped", "drop", True),
        ("BOS, kept", "keep", True),
        *((f"{m} dumm{'y' if m == 1 else 'ies'}", DummySinks(m), False) for m in (1, 2, 4, 8)),
        ("the system prompt", SharedPrefix(LOOKUP_SYSTEM), False),
    ]


def sink_methods(policy: object) -> dict[str, LinkMethod]:
    """What is linked under each policy; APE only behind a shared prefix, as its paper compiles."""
    methods = {"reused": LegoLink(0), "LegoLink-1": LegoLink(1), "LegoLink-4": LegoLink(4)}
    if isinstance(policy, SharedPrefix):
        return {**methods, "APE, T = S = 0.9": APE(), "APE, T = S = 1": APE(1, 1)}
    return methods


class Measured:
    """What one arm did, question by question."""

    def __init__(self) -> None:
        self.right: list[float] = []
        self.divergence: list[float] = []
        self.recomputed: list[float] = []
        self.flops: list[float] = []

    def add(self, prompt, answer: int, full: torch.Tensor) -> None:
        """Record one link: `full` are the log-probabilities of a full prefill."""
        linked = prompt.logits.double().log_softmax(-1)
        self.right.append(float(linked.argmax() == answer))
        self.divergence.append(float((full.exp() * (full - linked)).sum()))
        self.recomputed.append(prompt.report.tokens_recomputed / prompt.report.tokens_total)
        self.flops.append(prompt.report.flops / prompt.report.flops_full_prefill)

    def extend(self, other: "Measured") -> None:
        """Go on with what was measured on other questions."""
        for name, values in vars(other).items():
            vars(self)[name].extend(values)


def bootstrap(values: np.ndarray, rng: np.random.Generator, resamples: int = 2000) -> list[float]:
    """95 % percentile interval of the mean."""
    picks = rng.integers(0, len(values), (resamples, len(values)))
    return np.quantile(values[picks].mean(axis=1), [0.025, 0.975]).tolist()


@cache
def pic_behind(path: str, label: str = "nothing") -> PIC:
    """One for each kind of sinks in a process, on one store."""
    model, tokenizer = loaded(path)
    store = ChunkStore() if label == "nothing" else pic_behind(path).store
    policies = {name: policy for name, policy, _ in sink_arms()}
    # Every arm links, whatever it costs: the arms are to be compared, not served.
    return PIC(model, tokenizer, store, sinks=policies[label], flops_per_byte=None)


def methods_on(path: str, chunk_tokens: int | None, problem: LookupProblem) -> dict[str, Measured]:
    """Every method on one question; documents as chunks, or cut into pieces."""
    pic = pic_behind(path)
    measured = {label: Measured() for _, label, _ in method_arms()}
    answer = pic.tokenizer(problem.questions[0][1])["input_ids"][0]
    texts = problem.documents if chunk_tokens is None else cut(problem.documents, chunk_tokens)
    chunks = [pic.compile(text) for text in (problem.system, *texts)]
    full = torch.empty(0)
    for _, label, method in method_arms():
        prompt = pic.link(chunks, problem.query(), method)
        if label == "full":
            full = prompt.logits.double().log_softmax(-1)
        measured[label].add(prompt, answer, full)
    pic.store.clear()
    return measured


def measure_methods(
    path: str, made: list[LookupProblem], chunk_tokens: int | None, seed: int, workers: int
) -> list[dict]:
    """Every method on the same questions."""
    task = partial(methods_on, path, chunk_tokens)
    measured = together(spread(task, made, workers, f"chunks of {chunk_tokens or 'a document'}"))
    draws = np.random.default_rng(seed)
    rows = []
    for family, label, _ in method_arms():
        row = summary(measured[label], measured["full"], draws)
        if (beside := control(family, label)) is not None:
            mine, drawn = measured[label], measured[beside]
            for name in ("right", "divergence"):
                difference = np.subtract(getattr(mine, name), getattr(drawn, name))
                row[f"{name}_minus_random"] = float(difference.mean())
                row[f"{name}_minus_random_interval"] = bootstrap(difference, draws)
        rows.append({"arm": label, "family": family, **row})
    return rows


def sinks_on(path: str, problem: LookupProblem) -> dict[tuple[str, str], Measured]:
    """One question behind every kind of sinks, with and without recomputed tokens."""
    plain, query = pic_behind(path), problem.query()
    answer = plain.tokenizer(problem.questions[0][1])["input_ids"][0]
    chunks = [plain.compile(text) for text in (problem.system, *problem.documents)]
    prompt = plain.link(chunks, query, FullRecompute())
    full = prompt.logits.double().log_softmax(-1)
    measured = {("full", "full"): Measured()}
    measured["full", "full"].add(prompt, answer, full)
    for label, policy, bos in sink_arms():
        pic, before = pic_behind(path, label), f"{plain.tokenizer.bos_token} " if bos else ""
        chunks = [pic.compile(problem.system, first=True)]
        chunks += [pic.compile(before + text) for text in problem.documents]
        for name, method in sink_methods(policy).items():
            measured[label, name] = Measured()
            measured[label, name].add(pic.link(chunks, query, method), answer, full)
    plain.store.clear()
    return measured


def measure_sinks(path: str, made: list[LookupProblem], seed: int, workers: int) -> list[dict]:
    """What chunks are compiled behind."""
    measured = together(spread(partial(sinks_on, path), made, workers, "compiled behind"))
    reference = measured.pop(("full", "full"))
    draws = np.random.default_rng(seed)
    return [
        {"compiled_behind": label, "method": name, **summary(one, reference, draws)}
        for (label, name), one in measured.items()
    ]


def together(parts: Iterable[dict]) -> dict:
    """What was measured on single questions, as if on all of them, in their order."""
    whole: dict = {}
    for part in parts:
        for arm, one in part.items():
            whole.setdefault(arm, Measured()).extend(one)
    return whole


def summary(one: Measured, full: Measured, draws: np.random.Generator) -> dict:
    """Means over questions with intervals; accuracy also as the paired difference from full."""
    right, divergence = np.array(one.right), np.array(one.divergence)
    return {
        "problems": len(right),
        "accuracy": float(right.mean()),
        "accuracy_interval": bootstrap(right, draws),
        "accuracy_minus_full": float((right - np.array(full.right)).mean()),
        "accuracy_minus_full_interval": bootstrap(right - np.array(full.right), draws),
        "kl_to_full": float(divergence.mean()),
        "kl_to_full_interval": bootstrap(divergence, draws),
        "share_recomputed": float(np.mean(one.recomputed)),
        "share_of_flops": float(np.mean(one.flops)),
    }


def figure(record: dict, path: Path) -> None:
    """KL and accuracy against the share of the prompt that was recomputed, both experiments."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 9), sharex=True, layout="constrained")
    titles = {
        "documents": "chunks are documents",
        "cut": f"chunks are pieces of {record['configuration']['chunk_tokens']} tokens",
    }
    for (name, title), (left, right) in zip(titles.items(), axes, strict=True):
        families = dict.fromkeys(row["family"] for row in record[name] if row["family"] != "full")
        for index, family in enumerate(families):
            rows = [row for row in record[name] if row["family"] == family]
            style = dict(
                color=f"C{index % 10}",
                marker="os^vD*Px"[index % 8],
                linewidth=1,
                label=family,
                alpha=0.8,
            )
            x = [row["share_recomputed"] for row in rows]
            left.plot(x, [max(row["kl_to_full"], 1e-9) for row in rows], **style)
            right.plot(x, [row["accuracy"] for row in rows], **style)
        right.axhline(record[name][0]["accuracy"], color="black", linewidth=0.8, label="full")
        left.set(yscale="log", ylabel="KL divergence from full prefill", title=title)
        right.set(ylabel="answer accuracy", ylim=(-0.03, 1.06), title=title)
    for bottom in axes[1]:
        bottom.set(xlabel="share of the prompt recomputed, mean over layers", xlim=(0, 1))
    axes[0][1].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def interval(row: dict, name: str, form: str) -> str:
    """A mean with its interval, as text."""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:{form}} ({low:{form}} to {high:{form}})"


def methods_table(rows: list[dict]) -> str:
    """One experiment's arms."""
    lines = [
        "| method | recomputed | operations | accuracy (95 %) | minus full | KL to full |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['arm']} | {row['share_recomputed']:.1%} | {row['share_of_flops']:.1%} "
        f"| {interval(row, 'accuracy', '.3f')} | {interval(row, 'accuracy_minus_full', '+.3f')} "
        f"| {interval(row, 'kl_to_full', '.1e')} |"
        for row in rows
    ]
    return "\n".join(lines)


def control_table(rows: list[dict]) -> str:
    """Methods less random recomputation of as many tokens, paired by question."""
    lines = ["| | accuracy | KL to full |", "| --- | ---: | ---: |"]
    lines += [
        f"| {row['arm']} minus random | {interval(row, 'right_minus_random', '+.3f')} "
        f"| {interval(row, 'divergence_minus_random', '+.1e')} |"
        for row in rows
        if "right_minus_random" in row
    ]
    return "\n".join(lines)


def sinks_table(rows: list[dict]) -> str:
    """What chunks were compiled behind."""
    lines = [
        "| compiled behind | method | recomputed | accuracy (95 %) | KL to full |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['compiled_behind']} | {row['method']} | {row['share_recomputed']:.1%} "
        f"| {interval(row, 'accuracy', '.3f')} | {interval(row, 'kl_to_full', '.1e')} |"
        for row in rows
    ]
    return "\n".join(lines)


def tables(record: dict) -> str:
    """What stands between the markers of docs/linking.md."""
    setting, where = record["configuration"], record["environment"]
    return "\n\n".join(
        [
            f"## Chunks are documents ({setting['problems']} questions)",
            methods_table(record["documents"]),
            control_table(record["documents"]),
            f"## Chunks are pieces of {setting['chunk_tokens']} tokens, cut anywhere",
            methods_table(record["cut"]),
            control_table(record["cut"]),
            "## What chunks are compiled behind",
            sinks_table(record["sinks"]),
            (
                f"From `docs/results/link_accuracy.json`: {where['hardware']}, torch "
                f"{where['torch']}, transformers {where['transformers']}."
            ),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=str(REFERENCE_MODEL))
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--chunk-tokens", type=int, default=16, help="of documents cut in pieces")
    parser.add_argument("--seed", type=int, default=4 * 10**9)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    args = parser.parse_args()
    begun = time.perf_counter()
    rng = random.Random(args.seed)
    made = [lookup_problem(rng, args.documents) for _ in range(args.problems)]
    record = {
        "configuration": {k: v for k, v in vars(args).items() if k not in ("out", "model")}
        | {"model": "examples/reference_model"},
        "environment": environment(),
        "documents": measure_methods(args.model, made, None, args.seed, args.workers),
        "cut": measure_methods(args.model, made, args.chunk_tokens, args.seed, args.workers),
        "sinks": measure_sinks(args.model, made, args.seed, args.workers),
    }
    record["seconds"] = time.perf_counter() - begun
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "link_accuracy.json").write_text(json.dumps(record, indent=1) + "\n")
    figure(record, args.out / "link_accuracy.png")
    print(tables(record))
    print(f"\n{record['seconds']:.0f} s; wrote {args.out / 'link_accuracy.json'} and .png")


if __name__ == "__main__":
    main()
