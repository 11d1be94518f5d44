"""Milestones and phoenixes in the heads of a model that reasons: how many, where, and pictures.

    python examples/experiments/milestone_maps.py --out docs/results

Dense runs of SmolLM2 with the adapter of `train_reasoning_adapter.py` on problems that it has not
seen, recorded by `sparsity.record`. Pages are sorted into kinds as the RaaS paper sorts attention
maps by eye (arXiv 2502.11147, section 3; `sparsity.recorded.milestones`), head by head. Writes
`milestone_maps.json` and, of the four heads with the largest share of milestones in different
layers, `milestone_maps.png`.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from environment import environment
from quickstart_pages import markdown
from reasoning_accuracy import ADAPTER, reasoner
from tqdm import tqdm
from word_problems import final_answer, prompt_ids, unseen

from sparsity import Trace, record
from sparsity.recorded.milestones import NAMES, Kinds, Thresholds, classify, plot_head

SHOWN = 4
"""Heads of the picture."""


def row_of(layer: int, head: int, found: list[Kinds]) -> dict:
    """Shares of a head's pages by kind, means over the runs, and where its phoenixes are."""
    kinds = [
        Kinds(
            **{name: getattr(one, name)[head : head + 1] for name in (*NAMES, "returns")},
            prompt=one.prompt,
        )
        for one in found
    ]
    row: dict = {"layer": layer, "kv_head": head}
    row |= {name: float(np.mean([one.share(name) for one in kinds])) for name in NAMES}
    row["phoenix_pages"] = sum(int(one.phoenix.sum()) for one in kinds)
    row["of_them_in_the_prompt"] = sum(int((one.phoenix & one.prompt).sum()) for one in kinds)
    row["milestone_pages"] = sum(int(one.milestone.sum()) for one in kinds)
    inside = sum(int((one.milestone & one.prompt).sum()) for one in kinds)
    return row | {"milestones_in_the_prompt": inside}


def most(rows: list[dict], count: int) -> list[dict]:
    """Of so many layers the head with the largest share of milestones, those layers that lead."""
    best: dict[int, dict] = {}
    for row in sorted(rows, key=lambda row: -row["milestone"]):
        best.setdefault(row["layer"], row)
    return sorted(list(best.values())[:count], key=lambda row: row["layer"])


def picture(trace: Trace, heads: list[dict], page_size: int, path: Path) -> None:
    """The attention of some heads in one run, as `sparsity.milestone_map` draws it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(heads), figsize=(4 * len(heads), 4.8), squeeze=False,
                                sharey=True, layout="constrained")  # fmt: skip
    for axis, row in zip(axes[0], heads, strict=True):
        image = plot_head(axis, trace, row["layer"], row["kv_head"], page_size)
        shares = ", ".join(f"{name} {row[name]:.0%}" for name in ("milestone", "phoenix"))
        axis.set(xlabel="token attended to")
        axis.set_title(f"layer {row['layer']}, KV head {row['kv_head']}\n{shares}", fontsize=9)
    axes[0][0].set_ylabel("token that attends")
    figure.colorbar(image, ax=axes[0].tolist(), label="share of the attention")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(found: dict) -> str:
    """What stands between the markers of milestone_maps.json in docs/retention.md."""
    rows = found["rows"]
    thirds = np.array_split(sorted({row["layer"] for row in rows}), 3)
    shown = []
    for layers in (*thirds, sorted({row["layer"] for row in rows})):
        own = [row for row in rows if row["layer"] in layers]
        line = {"layers": f"{min(layers)} to {max(layers)}", "heads": len(own)}
        line |= {name: float(np.mean([row[name] for row in own])) for name in NAMES}
        for kind, inside in (
            ("phoenix_pages", "of_them_in_the_prompt"),
            ("milestone_pages", "milestones_in_the_prompt"),
        ):
            line[kind] = f"{sum(row[inside] for row in own)} of {sum(row[kind] for row in own)}"
        shown.append(line)
    columns = {"layers": "{layers}", "KV heads": "{heads}"}
    columns |= {name: f"{{{name}:.1%}}" for name in NAMES}
    columns |= {
        "milestones in the prompt": "{milestone_pages}",
        "phoenixes in the prompt": "{phoenix_pages}",
    }
    return markdown(shown, columns)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a model of examples/models.py")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="folder of a LoRA adapter")
    parser.add_argument("--problems", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16, help="of a problem")
    parser.add_argument("--page-size", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=0.05, help="share at which a page matters")
    parser.add_argument("--gap", type=int, default=128, help="steps after which it has faded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    begun = time.perf_counter()
    model, tokenizer = reasoner(args.model, args.adapter)
    problems = unseen(args.seed, args.problems, (args.steps, args.steps))
    limits, traces, right = Thresholds(alpha=args.alpha, gap=args.gap), [], []
    for problem in tqdm(problems, desc="dense runs"):
        ids = torch.tensor([prompt_ids(tokenizer, problem.question)], device=model.device)
        longest = len(tokenizer(problem.solution)["input_ids"])
        traces.append(record(model, input_ids=ids, max_new_tokens=longest, do_sample=False))
        behind = traces[-1].ids[ids.shape[1] :]
        right.append(final_answer(tokenizer.decode(behind)) == problem.answer)
    rows = []
    for layer in tqdm(sorted(traces[0].layers), desc="layers"):
        found = [
            classify(one.mass(layer, args.page_size), one.prompt_tokens, args.page_size, limits)
            for one in traces
        ]
        rows += [row_of(layer, head, found) for head in range(len(found[0].milestone))]
    names = ("model", "problems", "steps", "page_size", "alpha", "gap", "seed")
    result = {
        "configuration": {name: getattr(args, name) for name in names},
        "environment": environment(),
        "tokens": [[one.prompt_tokens, one.tokens - one.prompt_tokens] for one in traces],
        "right": right,
        "rows": rows,
        "shown": [[row["layer"], row["kv_head"]] for row in most(rows, SHOWN)],
        "seconds": time.perf_counter() - begun,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "milestone_maps.json").write_text(json.dumps(result, indent=1) + "\n")
    picture(traces[0], most(rows, SHOWN), args.page_size, args.out / "milestone_maps.png")
    print(table(result))


if __name__ == "__main__":
    main()
