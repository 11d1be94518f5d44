"""Answer accuracy and distance from full prefill against recomputed tokens, for every link method.

    python examples/link_accuracy.py --out docs/results

Lookups on the reference model, every arm on the same questions. Writes `link_accuracy.json`,
`link_accuracy.png`, and with --out docs/results the page docs/linking.md. Intervals are paired
bootstraps over questions: each resample draws the same questions for both arms.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from evaluate import REFERENCE_MODEL, environment, load
from reference_tasks import lookup_problem
from tqdm import tqdm

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
    """Every method over its budgets; random beside LegoLink at the same tokens a chunk."""
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


def sink_arms(system: str) -> list[tuple[str, object, bool]]:
    """What chunks are compiled behind: label, policy, whether documents begin with a BOS."""
    return [
        ("nothing", "drop", False),
        ("BOS, dropped", "drop", True),
        ("BOS, kept", "keep", True),
        *((f"{m} dummies", DummySinks(m), False) for m in (1, 2, 4, 8)),
        ("the system prompt", SharedPrefix(system), False),
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


def bootstrap(values: np.ndarray, rng: np.random.Generator, resamples: int = 2000) -> list[float]:
    """95 % percentile interval of the mean."""
    picks = rng.integers(0, len(values), (resamples, len(values)))
    return np.quantile(values[picks].mean(axis=1), [0.025, 0.975]).tolist()


def measure(problems: int, documents: int, seed: int, model_name: str) -> dict:
    """Rows of both experiments, each arm on the same questions."""
    model, tokenizer = load(model_name)
    rng = random.Random(seed)
    made = [lookup_problem(rng, documents) for _ in range(problems)]
    arms = method_arms()
    sinks = sink_arms(made[0].system)
    by_method = {label: Measured() for _, label, _ in arms}
    by_sink = {
        (label, name): Measured() for label, policy, _ in sinks for name in sink_methods(policy)
    }
    store = ChunkStore()
    # Every arm links, whatever it costs: the arms are to be compared, not served.
    pics = {
        label: PIC(model, tokenizer, store, sinks=policy, flops_per_byte=None)
        for label, policy, _ in sinks
    }
    plain = pics["nothing"]
    for problem in tqdm(made, desc="questions"):
        answer = tokenizer(problem.questions[0][1])["input_ids"][0]
        texts, query = [problem.system, *problem.documents], problem.query()
        chunks = [plain.compile(text) for text in texts]
        full = torch.empty(0)
        for _, label, method in arms:
            prompt = plain.link(chunks, query, method)
            if label == "full":
                full = prompt.logits.double().log_softmax(-1)
            by_method[label].add(prompt, answer, full)
        for label, policy, bos in sinks:
            pic = pics[label]
            before = f"{tokenizer.bos_token} " if bos else ""
            behind = [pic.compile(texts[0], first=True)]
            behind += [pic.compile(before + text) for text in texts[1:]]
            for name, method in sink_methods(policy).items():
                by_sink[label, name].add(pic.link(behind, query, method), answer, full)
        store.clear()
    draws = np.random.default_rng(seed)
    method_rows = []
    for family, label, _ in arms:
        row = summary(by_method[label], by_method["full"], draws)
        control = label.replace("LegoLink-", "random-")
        if family == "LegoLink":
            row["divergence_to_random"] = float(
                np.mean(by_method[label].divergence) - np.mean(by_method[control].divergence)
            )
            difference = np.subtract(by_method[label].divergence, by_method[control].divergence)
            row["divergence_to_random_interval"] = bootstrap(difference, draws)
        method_rows.append({"arm": label, "family": family, **row})
    sink_rows = [
        {"compiled_behind": label, "method": name, **summary(one, by_method["full"], draws)}
        for (label, name), one in by_sink.items()
    ]
    return {"methods": method_rows, "sinks": sink_rows}


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
    """KL and accuracy against the share of the prompt that was recomputed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    families = dict.fromkeys(row["family"] for row in record["methods"] if row["family"] != "full")
    for index, family in enumerate(families):
        rows = [row for row in record["methods"] if row["family"] == family]
        style = dict(
            color=f"C{index % 10}", marker="os^vD*Px"[index % 8], linestyle="-", label=family
        )
        x = [row["share_recomputed"] for row in rows]
        kl = [max(row["kl_to_full"], 1e-9) for row in rows]
        low = [max(row["kl_to_full_interval"][0], 1e-9) for row in rows]
        high = [max(row["kl_to_full_interval"][1], 1e-9) for row in rows]
        spread = [np.maximum(np.subtract(kl, low), 0), np.maximum(np.subtract(high, kl), 0)]
        left.errorbar(x, kl, spread, capsize=2, linewidth=1, **style)
        right.plot(x, [row["accuracy"] for row in rows], linewidth=1, **style)
    full = record["methods"][0]["accuracy"]
    right.axhline(full, color="black", linewidth=0.8, label="full prefill")
    left.set(yscale="log", ylabel="KL divergence from full prefill")
    right.set(ylabel="answer accuracy")
    for axes in (left, right):
        axes.set(xlabel="share of the prompt recomputed, mean over layers", xlim=(0, 1))
    right.legend(fontsize=8)
    figure.suptitle(f"Lookup in {record['configuration']['documents']} documents")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def interval(row: dict, name: str, form: str) -> str:
    """A mean with its interval, as text."""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:{form}} ({low:{form}} to {high:{form}})"


def tables(record: dict) -> str:
    """The two tables of docs/linking.md."""
    lines = [
        "| method | recomputed | operations | accuracy (95 %) | minus full | KL to full |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['arm']} | {row['share_recomputed']:.1%} | {row['share_of_flops']:.1%} "
        f"| {interval(row, 'accuracy', '.3f')} | {interval(row, 'accuracy_minus_full', '+.3f')} "
        f"| {interval(row, 'kl_to_full', '.1e')} |"
        for row in record["methods"]
    ]
    lines += [
        "",
        "| compiled behind | method | recomputed | accuracy (95 %) | KL to full |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['compiled_behind']} | {row['method']} | {row['share_recomputed']:.1%} "
        f"| {interval(row, 'accuracy', '.3f')} | {interval(row, 'kl_to_full', '.1e')} |"
        for row in record["sinks"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=str(REFERENCE_MODEL))
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--seed", type=int, default=4 * 10**9)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    begun = time.perf_counter()
    record = {
        "configuration": {k: v for k, v in vars(args).items() if k not in ("out", "model")}
        | {"model": "examples/reference_model"},
        "environment": environment(),
        **measure(args.problems, args.documents, args.seed, args.model),
    }
    record["seconds"] = time.perf_counter() - begun
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "link_accuracy.json").write_text(json.dumps(record, indent=1) + "\n")
    figure(record, args.out / "link_accuracy.png")
    print(tables(record))
    print(f"\n{record['seconds']:.0f} s; wrote {args.out / 'link_accuracy.json'} and .png")


if __name__ == "__main__":
    main()
