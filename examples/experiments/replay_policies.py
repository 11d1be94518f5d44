"""What every retention policy would have kept of a dense run, without running the model again.

    python examples/experiments/replay_policies.py --out docs/results
    python examples/experiments/replay_policies.py --out out --model NAME_OR_PATH --prompt "..."

Records dense runs (the reference model's chains of thought, or one prompt on any HF model), replays
every policy over them, and draws where attention goes. Writes `replay.json` and `replay.png`.
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from environment import environment
from loaded import loaded
from reference_tasks import reasoning_problem
from tqdm import tqdm

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
    SparsityError,
    StreamingLLM,
    Trace,
    VaSE,
    record,
    replay,
)
from sparsity.policies.base import Policy
from sparsity.recorded.milestones import NAMES, Thresholds, classify, plot_head

# A policy by its budget in tokens. Where the prompt is pinned the label says so. Windows and
# intervals that are longer than the papers' smallest budgets are a quarter of the budget here.
ARMS: dict[str, Callable[[int], Policy]] = {
    "full": lambda budget: Full(),
    "random": lambda budget: Random(budget, pin_prompt=False),
    "random, prompt pinned": lambda budget: Random(budget),
    "StreamingLLM": lambda budget: StreamingLLM(budget),
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
    "LazyEviction": lambda budget: LazyEviction(
        budget, sinks=0, evict_every=budget // 4, ties="age"
    ),
    "VaSE": lambda budget: VaSE(
        budget, window=budget // 4, large=budget // 4, evict_every=budget // 4
    ),
}
MEASURES = (
    "kept_mass",
    "regret",
    "recall",
    "prompt_survival",
    "milestone_mass",
    "phoenix_survival",
)


def mean(values: list[float]) -> float | None:
    """Over the runs that have such pages (NaN for the others); None where none has."""
    there = [value for value in values if not math.isnan(value)]
    return statistics.fmean(there) if there else None


def kinds_by_layer(traces: list[Trace], page_size: int, thresholds: Thresholds) -> list[dict]:
    """Shares of milestones, phoenixes, steady and unused pages in each layer."""
    rows = []
    for layer in traces[0].layers:
        kinds = [
            classify(trace.mass(layer, page_size), trace.prompt_tokens, page_size, thresholds)
            for trace in traces
        ]
        row: dict = {"layer": layer}
        row |= {name: float(np.mean([k.share(name) for k in kinds])) for name in NAMES}
        back = sum(int(k.phoenix.sum()) for k in kinds)
        inside = sum(int((k.phoenix & k.prompt).sum()) for k in kinds)
        rows.append(row | {"phoenix_pages": back, "of_them_in_the_prompt": inside})
    return rows


def figure(trace: Trace, page_size: int, path: Path) -> None:
    """One head of each of at most four layers, as `sparsity.milestone_map` draws it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = sorted(trace.layers)
    layers = layers[:: max(1, len(layers) // 4)][:4]
    figure, axes = plt.subplots(1, len(layers), figsize=(4 * len(layers), 4.5), squeeze=False,
                                sharey=True, layout="constrained")  # fmt: skip
    for ax, layer in zip(axes[0], layers, strict=True):
        image = plot_head(ax, trace, layer, 0, page_size)
        ax.set(title=f"layer {layer}, KV head 0", xlabel="token attended to")
    axes[0][0].set_ylabel("token that attends")
    figure.colorbar(image, ax=axes[0].tolist(), label="share of the attention")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(record: dict) -> str:
    """As Markdown."""
    heads = ("attention kept", "with hindsight", "top pages", "prompt held", "milestones",
             "phoenix returns")  # fmt: skip
    lines = [f"| policy | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    for row in record["rows"]:
        if "refused" in row:
            lines.append(f"| {row['arm']} | refused | | | | | |")
            continue
        formats = zip(MEASURES, (".3f", "+.3f", ".3f", ".2f", ".3f", ".2f"), strict=True)
        cells = ("-" if row[name] is None else format(row[name], how) for name, how in formats)
        lines.append(f"| {row['arm']} | {' | '.join(cells)} |")
    lines += ["", "| layer | " + " | ".join(NAMES) + " | phoenix pages in the prompt |"]
    lines.append("| --- |" + " ---: |" * (len(NAMES) + 1))
    for row in record["kinds"]:
        shares = " | ".join(f"{row[name]:.1%}" for name in NAMES)
        inside = f"{row['of_them_in_the_prompt']} of {row['phoenix_pages']}"
        lines.append(f"| {row['layer']} | {shares} | {inside} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--prompt", help="a prompt of your own instead of generated problems")
    parser.add_argument("--new-tokens", type=int, default=445)
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--budget", type=int, default=384)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=0.05, help="share at which a page matters")
    parser.add_argument("--seed", type=int, default=6 * 10**9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    model, tokenizer = loaded(args.model)
    rng = random.Random(args.seed)
    prompts = [args.prompt] if args.prompt else []
    prompts = prompts or [reasoning_problem(rng, 40).prompt for _ in range(args.problems)]
    traces = []
    for prompt in tqdm(prompts, desc="dense runs"):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        inputs = inputs.to(model.device)
        traces.append(record(model, **inputs, max_new_tokens=args.new_tokens, do_sample=False))
    limits, rows = Thresholds(alpha=args.alpha), []
    for name, policy in tqdm(ARMS.items(), desc="policies"):
        row: dict = {"arm": name, "budget": args.budget}
        try:
            results = [
                replay(trace, policy(args.budget), None, args.page_size, args.budget, limits, False)
                for trace in traces
            ]
            row |= {m: mean([getattr(r, m) for r in results]) for m in MEASURES}
        except SparsityError as error:
            row["refused"] = str(error)
        rows.append(row)
    result = {
        "configuration": {k: v for k, v in vars(args).items() if k not in ("out", "model")}
        | {"model": "examples/reference_model" if args.model == "reference" else args.model},
        "environment": environment(),
        "tokens": [[t.prompt_tokens, t.tokens - t.prompt_tokens] for t in traces],
        "rows": rows,
        "kinds": kinds_by_layer(traces, args.page_size, limits),
        "seconds": time.perf_counter() - begun,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "replay.json").write_text(json.dumps(result, indent=1) + "\n")
    figure(traces[0], args.page_size, args.out / "replay.png")
    print(table(result))
    print(f"\n{result['seconds']:.0f} s; wrote {args.out / 'replay.json'} and .png")


if __name__ == "__main__":
    main()
