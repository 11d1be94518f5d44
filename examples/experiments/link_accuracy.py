"""Answer accuracy and distance from full prefill against recomputed tokens, for every link method.

    python examples/experiments/link_accuracy.py --out docs/results

Lookups on the reference model by `picache.compare`, every arm on the same questions. Writes
`link_accuracy.json` and `link_accuracy.png`; `render_tables.py` then writes docs/linking.md.
Intervals are paired bootstraps over questions: each resample draws the same ones for all arms.
"""

import argparse
import json
import random
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from environment import environment
from loaded import loaded
from parallel import spread
from reference_tasks import BOS, LOOKUP_SYSTEM, LookupProblem, cut, lookup_problem

from picache import (
    A3,
    APE,
    Arm,
    CacheBlend,
    Combined,
    Comparison,
    DummySinks,
    LegoLink,
    LinkMethod,
    NaiveReuse,
    OracleDeviation,
    Problem,
    ProphetKV,
    RandomRecompute,
    SharedPrefix,
    compare,
)

RATIOS = (0.05, 0.15, 0.3, 0.5)


def method_arms() -> list[tuple[str, str, LinkMethod]]:
    """Family, label and method, over all budgets; random at LegoLink's tokens and every ratio."""
    arms: list[tuple[str, str, LinkMethod]] = [
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


def sink_arms() -> dict[str, dict[str, Arm]]:
    """What is linked behind what; APE only behind a shared prefix, as its paper compiles."""
    methods = {"reused": LegoLink(0), "LegoLink-1": LegoLink(1), "LegoLink-4": LegoLink(4)}
    ape = {"APE, T = S = 0.9": APE(), "APE, T = S = 1": APE(1, 1)}
    dummies = {f"{m} dumm{'y' if m == 1 else 'ies'}": DummySinks(m) for m in (1, 2, 4, 8)}
    shared = {"the system prompt": SharedPrefix(LOOKUP_SYSTEM)}
    return {
        label: {
            name: Arm(method, sinks)
            for name, method in {**methods, **(ape if label in shared else {})}.items()
        }
        for label, sinks in {"nothing": "drop", **dummies, **shared}.items()
    }


def problem_of(made: LookupProblem, chunk_tokens: int | None = None) -> Problem:
    """The first question; chunks are the documents, or pieces of so many tokens."""
    texts = made.documents if chunk_tokens is None else cut(made.documents, chunk_tokens)
    instruction = made.system.removeprefix(BOS).strip()
    return Problem(tuple(texts), made.query(), (made.questions[0][1],), instruction)


def compared_on(path: str, arms: Mapping[str, LinkMethod | Arm], some: list[Problem]) -> Comparison:
    """All arms on some of the problems; the answers are one token long."""
    model, tokenizer = loaded(path)
    return compare(model, tokenizer, some, arms, new_tokens=1, progress=False)


def compared(
    path: str,
    arms: Mapping[str, LinkMethod | Arm],
    problems: list[Problem],
    seed: int,
    workers: int,
    what: str,
) -> Comparison:
    """All arms on all problems, eight at a time, by one process or several."""
    parts = [problems[i : i + 8] for i in range(0, len(problems), 8)]
    done = list(spread(partial(compared_on, path, arms), parts, workers, what))
    measured = {
        arm: {m: np.concatenate([part.measured[arm][m] for part in done]) for m in metrics}
        for arm, metrics in done[0].measured.items()
    }
    return replace(done[0], measured=measured, seed=seed)


def summary(result: Comparison, arm: str) -> dict:
    """Means over questions with intervals; accuracy also as the paired difference from full."""
    found = result[arm]
    row = {"problems": result.units}
    for name, interval in {
        "accuracy": found["accuracy"],
        "accuracy_minus_full": result.difference(arm, "accuracy"),
        "kl_to_full": found["kl"],
    }.items():
        row |= {name: interval.estimate, f"{name}_interval": list(interval[1:])}
    shares = {"share_recomputed": "recomputed", "share_of_flops": "operations"}
    return row | {name: found[metric].estimate for name, metric in shares.items()}


def method_rows(result: Comparison) -> list[dict]:
    """Every method, and how it does beside random recomputation of as many tokens."""
    rows = [{"arm": "full", "family": "full", **summary(result, "full")}]
    for family, label, _ in method_arms():
        row = {"arm": label, "family": family, **summary(result, label)}
        if (beside := control(family, label)) is not None:
            for name, metric in {"right": "accuracy", "divergence": "kl"}.items():
                interval = result.difference(label, metric, of=beside)
                row[f"{name}_minus_random"] = interval.estimate
                row[f"{name}_minus_random_interval"] = list(interval[1:])
        rows.append(row)
    return rows


def measured(path: str, made: list[LookupProblem], chunk_tokens: int, seed: int, workers: int):
    """The record's rows: documents as chunks, pieces as chunks, what chunks are compiled behind."""
    methods = {label: method for _, label, method in method_arms()}
    behind = sink_arms()
    arms = {f"{b}: {name}": arm for b, some in behind.items() for name, arm in some.items()}
    run = partial(compared, path, seed=seed, workers=workers)
    whole = [problem_of(one) for one in made]
    pieces = [problem_of(one, chunk_tokens) for one in made]
    sinks = run(arms, whole, what="compiled behind")
    return {
        "documents": method_rows(run(methods, whole, what="chunks are documents")),
        "cut": method_rows(run(methods, pieces, what="chunks are pieces")),
        "sinks": [
            {"compiled_behind": b, "method": name, **summary(sinks, f"{b}: {name}")}
            for b, some in behind.items()
            for name in some
        ],
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
    parser.add_argument("--model", default="reference")
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
        **measured(args.model, made, args.chunk_tokens, args.seed, args.workers),
    }
    record["seconds"] = time.perf_counter() - begun
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "link_accuracy.json").write_text(json.dumps(record, indent=1) + "\n")
    figure(record, args.out / "link_accuracy.png")
    print(tables(record))
    print(f"\n{record['seconds']:.0f} s; wrote {args.out / 'link_accuracy.json'} and .png")


if __name__ == "__main__":
    main()
