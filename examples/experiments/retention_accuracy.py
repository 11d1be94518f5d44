"""Answer accuracy, decoded length and loops against the KV budget, for every retention policy.

    python examples/experiments/retention_accuracy.py --out docs/results
    python examples/experiments/retention_accuracy.py --out docs/results --add --arms full NEW

Chains of thought of the reference model, every policy on the same problems. Writes
`retention_accuracy.json` and `.png`. Intervals are bootstraps over problems; differences from full
attention and from random eviction are paired. A run that is cut off goes on where it was; `--add`
measures some policies on the same problems and leaves the rows of the others as they were.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from environment import environment, hardware
from loaded import loaded
from parallel import spread
from reference_tasks import ReasoningProblem, final_answer, reasoning_problem

from sparsity import (
    H2O,
    RKV,
    TOVA,
    Full,
    LazyEviction,
    PyramidKV,
    Quest,
    QuestRaaS,
    RaaS,
    Random,
    SnapKV,
    SparseCache,
    SparsityError,
    StreamingLLM,
    VaSE,
)
from sparsity.policies.base import Policy

# A policy by its budget in tokens. Where the prompt is pinned the label says so. Windows and
# intervals that are longer than the papers' smallest budgets are a quarter of the budget here.
ARMS: dict[str, Callable[[int], Policy]] = {
    "full": lambda budget: Full(),
    "random": lambda budget: Random(budget, pin_prompt=False),
    "random, prompt pinned": lambda budget: Random(budget),
    "StreamingLLM": lambda budget: StreamingLLM(budget),
    "StreamingLLM, absolute positions": lambda budget: StreamingLLM(budget, positions="absolute"),
    "Quest": lambda budget: Quest(budget, dense_layers=0),
    "RaaS": lambda budget: RaaS(budget, pin_prompt=False),
    "RaaS, prompt pinned": lambda budget: RaaS(budget),
    "RaaS, top half": lambda budget: RaaS(budget, top_ratio=0.5, pin_prompt=False),
    "Quest on the prompt, RaaS behind": lambda budget: QuestRaaS(
        budget // 2, prompt_budget=budget // 2
    ),
    "H2O": lambda budget: H2O(budget),
    "H2O, by age": lambda budget: H2O(budget, normalise="age"),
    "TOVA": lambda budget: TOVA(budget),
    "SnapKV, decoding too": lambda budget: SnapKV(
        budget, window=budget // 4, evict_every=budget // 4
    ),
    "PyramidKV, decoding too": lambda budget: PyramidKV(
        budget, window=budget // 4, evict_every=budget // 4
    ),
    "R-KV": lambda budget: RKV(budget, evict_every=budget // 4),
    "LazyEviction": lambda budget: LazyEviction(budget, evict_every=budget // 4),
    "VaSE": lambda budget: VaSE(
        budget, window=budget // 4, large=budget // 4, evict_every=budget // 4
    ),
}
LOOP_TOKENS, LOOP_TIMES = 12, 3
Job = tuple[str, int]  # arm, budget


def loops(words: list[str]) -> bool:
    """Whether some 12 tokens in a row come at least three times: the chain goes round."""
    spans = zip(*(words[i:] for i in range(LOOP_TOKENS)), strict=False)
    return any(times >= LOOP_TIMES for times in Counter(spans).values())


def measure(path: str, problems: list[ReasoningProblem], batch_size: int, job: Job) -> dict:
    """One policy at one budget on every problem, or why it refuses."""
    name, budget = job
    where = f"{hardware()}, torch {torch.__version__}, transformers {transformers.__version__}"
    row: dict = {"arm": name, "budget": budget, "where": where}
    model, tokenizer = loaded(path)
    longest = max(len(tokenizer(p.solution)["input_ids"]) for p in problems)
    cap = longest + longest // 2
    right: list[bool] = []
    whole: list[bool] = []
    looped: list[bool] = []
    decoded: list[int] = []
    peak, begun = 0.0, time.perf_counter()
    for first in range(0, len(problems), batch_size):
        batch = problems[first : first + batch_size]
        inputs = tokenizer(
            [p.prompt for p in batch],
            return_tensors="pt",
            padding=True,
            return_token_type_ids=False,
        ).to(model.device)
        try:
            cache = SparseCache(model, ARMS[name](budget))
            out = model.generate(
                **inputs, past_key_values=cache, max_new_tokens=cap, do_sample=False
            )
        except SparsityError as error:
            return row | {"refused": str(error)}
        peak = max(peak, cache.report().peak_bytes / len(batch))
        for text, problem in zip(
            tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :]), batch, strict=True
        ):
            text = text.split(tokenizer.eos_token)[0]
            right.append(final_answer(text) == problem.answer)
            whole.append(problem.solution.startswith(text.strip()) and right[-1])
            looped.append(loops(text.split()))
            decoded.append(len(text.split()))
    return row | {
        "right": right,
        "whole": whole,
        "looped": looped,
        "decoded": decoded,
        "cap": cap,
        "peak_kv_bytes": peak,
        "seconds": time.perf_counter() - begun,
    }


def sweep(task: Callable[[Job], dict], jobs: list[Job], args: argparse.Namespace) -> list[dict]:
    """Every job's result, in order; those of an earlier run that was cut off are taken over."""
    path = args.out / "retention_accuracy.partial.jsonl"
    asked = {name: getattr(args, name) for name in ("model", "problems", "steps", "seed")}
    if not path.exists():
        path.write_text(json.dumps(asked) + "\n")
    first, *lines = path.read_text().splitlines()
    if json.loads(first) != asked:
        raise SystemExit(f"{path} is of another run, {first}: delete it, or give its arguments")
    done = {(row["arm"], row["budget"]): row for row in map(json.loads, lines)}
    missing = [job for job in jobs if job not in done]
    with path.open("a") as file:
        for job, row in zip(
            missing, spread(task, missing, args.workers, "policies at budgets"), strict=True
        ):
            done[job] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
    return [done[job] for job in jobs]


def joined(record: dict, earlier: dict) -> dict:
    """`record` with the rows of an earlier one on the same problems that it has not measured."""
    settings = record["configuration"], earlier["configuration"]
    mine, other = (
        {name: each[name] for name in ("problems", "steps", "seed")} for each in settings
    )
    if mine != other:
        raise SystemExit(f"the earlier result is of {other}: leave out --add, or give the same")
    rows = {(row["arm"], row["budget"]): row for row in earlier["rows"] + record["rows"]}
    order = list(ARMS)
    return record | {
        "configuration": earlier["configuration"]
        | {"arms": [name for name in ARMS if any(arm == name for arm, _ in rows)]},
        "rows": sorted(rows.values(), key=lambda row: (row["budget"], order.index(row["arm"]))),
        "seconds": earlier["seconds"] + record["seconds"],
    }


def bootstrap(values: np.ndarray, rng: np.random.Generator, resamples: int = 2000) -> list[float]:
    """95 % percentile interval of the mean."""
    picks = rng.integers(0, len(values), (resamples, len(values)))
    return np.quantile(values[picks].mean(axis=1), [0.025, 0.975]).tolist()


def summaries(measured: list[dict], seed: int) -> list[dict]:
    """Means with intervals; accuracy also as the paired difference from full and from random."""
    draws = np.random.default_rng(seed)
    full = np.array(measured[0]["right"], dtype=float)
    control = {r["budget"]: r for r in measured if r["arm"] == "random"}
    rows = []
    for one in measured:
        row = {key: one[key] for key in ("arm", "budget", "where")}
        if "refused" in one:
            rows.append(row | {"refused": one["refused"]})
            continue
        right, decoded = np.array(one["right"], dtype=float), np.array(one["decoded"])
        row |= {
            "problems": len(right),
            "accuracy": float(right.mean()),
            "accuracy_interval": bootstrap(right, draws),
            "accuracy_minus_full": float((right - full).mean()),
            "accuracy_minus_full_interval": bootstrap(right - full, draws),
            "whole_chain": float(np.mean(one["whole"])),
            "decoded_tokens": float(decoded.mean()),
            "at_the_cap": float(np.mean(decoded >= one["cap"])),
            "looped": float(np.mean(one["looped"])),
            "peak_kv_bytes": one["peak_kv_bytes"],
            "seconds": one["seconds"],
        }
        if one["budget"] in control:
            beside = right - np.array(control[one["budget"]]["right"], dtype=float)
            row["accuracy_minus_random"] = float(beside.mean())
            row["accuracy_minus_random_interval"] = bootstrap(beside, draws)
        rows.append(row)
    return rows


def figure(rows: list[dict], path: Path) -> None:
    """Accuracy and decoded length against the budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    full, budgets = rows[0], sorted({row["budget"] for row in rows if row["budget"]})
    for index, name in enumerate(name for name in ARMS if name != "full"):
        points = [row for row in rows if row["arm"] == name and "refused" not in row]
        style = dict(
            color=f"C{index % 10}",
            marker="os^vD*PxX<>"[index % 11],
            linestyle=("-", "--")[index // 10 % 2],
            linewidth=1,
            alpha=0.85,
            label=name,
        )
        x = [row["budget"] for row in points]
        left.plot(x, [row["accuracy"] for row in points], **style)
        right.plot(x, [row["decoded_tokens"] for row in points], **style)
    left.axhline(full["accuracy"], color="black", linewidth=0.8, label="full")
    right.axhline(full["decoded_tokens"], color="black", linewidth=0.8)
    left.set(ylabel="exact match of the answer", ylim=(-0.03, 1.06))
    right.set(ylabel="decoded tokens, mean")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [str(budget) for budget in budgets])
        axes.set_xlabel("budget, tokens a KV head")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(record: dict) -> str:
    """Accuracy with its interval by policy and budget, as Markdown."""
    budgets = record["configuration"]["budgets"]
    rows = {(row["arm"], row["budget"]): row for row in record["rows"]}

    def cell(row: dict) -> str:
        if "refused" in row:
            return "refused"
        low, high = row["accuracy_interval"]
        return f"{row['accuracy']:.3f} ({low:.2f} to {high:.2f})"

    lines = [
        "| policy | " + " | ".join(f"{budget}" for budget in budgets) + " |",
        "| --- |" + " ---: |" * len(budgets),
        "| full | " + " | ".join([cell(record["rows"][0])] * len(budgets)) + " |",
    ]
    for name in dict.fromkeys(row["arm"] for row in record["rows"][1:]):
        cells = [cell(rows[name, budget]) for budget in budgets]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--steps", type=int, default=40, help="lines of a chain of thought")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 384, 512, 1024])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=5 * 10**9)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--add", action="store_true", help="to the result that stands in --out")
    args = parser.parse_args()
    begun = time.perf_counter()
    rng = random.Random(args.seed)
    problems = [reasoning_problem(rng, args.steps) for _ in range(args.problems)]
    jobs: list[Job] = [("full", 0)]
    jobs += [(name, b) for b in args.budgets for name in args.arms if name != "full"]
    args.out.mkdir(parents=True, exist_ok=True)
    measured = sweep(partial(measure, args.model, problems, args.batch_size), jobs, args)
    _, tokenizer = loaded(args.model)
    record = {
        "configuration": {k: v for k, v in vars(args).items() if k not in ("out", "model")}
        | {
            "model": "examples/reference_model",
            "prompt_tokens": float(np.mean([len(tokenizer(p.prompt).input_ids) for p in problems])),
        },
        "environment": environment(),
        "rows": summaries(measured, args.seed),
        "seconds": time.perf_counter() - begun,
    }
    path = args.out / "retention_accuracy.json"
    if args.add:
        record = joined(record, json.loads(path.read_text()))
    path.write_text(json.dumps(record, indent=1) + "\n")
    figure(record["rows"], path.with_suffix(".png"))
    print(table(record))
    (args.out / "retention_accuracy.partial.jsonl").unlink()
    print(f"\n{time.perf_counter() - begun:.0f} s; wrote {path} and .png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
