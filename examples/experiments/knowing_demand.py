"""On which real mixes does knowing the demand pay, over class mean and over LAS?

    python examples/experiments/knowing_demand.py --data FOLDER --out docs/results

Recorded runs are split by time (by trial on tau-bench, by file where one model's runs are learned
and another's served): what a scheduler knows of a label is what the earlier half of its runs took,
and jobs are drawn from the later half, one preemptive server at no cost. Each mix is served under
labels of several kinds, of the same jobs: from the finest there are to none at all, where class
mean is first come, first served. FOLDER has what docs/traces.md lists; the applications of the
Hermes artifact are drawn from its samples, which have no times. Intervals are over seeds, paired.
Writes `knowing_demand.json` and `.png`.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from environment import environment
from knowing_mixes import NO_LABELS, Mix, drawing, mixes
from workers import add_workers

from demand import (
    FCFS,
    LAS,
    SERPT,
    ClassMean,
    Gittins,
    Oracle,
    Policy,
    RandomOrder,
    compare,
    paired_ratio_interval,
)

METRICS = ("mean_seconds", "p95_seconds")
KNOWING = ("SERPT", "Gittins")


def policies(mix: Mix) -> dict[str, Policy]:
    """LAS takes turns of a quarter of the median demand, or of a fiftieth of the mean."""
    known = mix.known(NO_LABELS)["any"]
    quantum = max(known.quantile(0.5) / 4, known.mean() / 50)
    return {
        "random": RandomOrder(),
        "FCFS": FCFS(),
        "LAS": LAS(quantum=quantum),
        "class mean": ClassMean(),
        "SERPT": SERPT(),
        "Gittins": Gittins(),
        "oracle": Oracle(),
    }


def served(
    mix: Mix, labelling: str, load: float, jobs: int, seeds: int, workers: int | str
) -> dict:
    """Of every policy: seconds, and ratios to class mean, LAS and FCFS, with their intervals."""
    chosen = policies(mix)
    draw = drawing(mix, labelling, load, jobs)
    result = compare(draw, chosen, range(seeds), workers=workers, progress=False)
    rows = {}
    for name in chosen:
        rows[name] = {metric: result[name][metric]._asdict() for metric in METRICS} | {
            f"{metric}_over_{baseline}": paired_ratio_interval(
                result.measured[name][metric], result.measured[baseline][metric]
            )._asdict()
            for metric in METRICS
            for baseline in ("class mean", "LAS", "FCFS")
        }
    known = list(mix.known(labelling).values())
    return {
        "mix": mix.name,
        "labels": labelling,
        "load": load,
        "arrivals": "recorded" if mix.times else "Poisson",
        "classes": len(known),
        "mean_demand_seconds": mix.known(NO_LABELS)["any"].mean(),
        "cv_known": _cv(mix.known(NO_LABELS)["any"].values, mix.known(NO_LABELS)["any"].weights),
        "rows": rows,
    }


def _cv(values: np.ndarray, weights: np.ndarray) -> float:
    mean = float(values @ weights)
    return float(np.sqrt((values - mean) ** 2 @ weights) / mean)


def _cell(ratio: dict[str, float]) -> str:
    return f"{ratio['estimate']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def table(record: dict, load: float, metric: str = "mean_seconds") -> str:
    """As Markdown: over class mean, and Gittins and SERPT over LAS."""
    over = ("random", "FCFS", "LAS", "SERPT", "Gittins", "oracle")
    heads = [*over, *(f"{name} over LAS" for name in KNOWING)]
    lines = [
        f"| mix | labels | class mean, s | {' | '.join(heads)} |",
        "| --- | --- |" + " ---: |" * (1 + len(heads)),
    ]
    for found in record["found"]:
        if found["load"] != load:
            continue
        rows = found["rows"]
        cells = [
            *(_cell(rows[name][f"{metric}_over_class mean"]) for name in over),
            *(_cell(rows[name][f"{metric}_over_LAS"]) for name in KNOWING),
        ]
        seconds = rows["class mean"][metric]["estimate"]
        name = f"{found['mix']} | {found['labels']} | {seconds:,.0f}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(record: dict) -> list[str]:
    """Of each load."""
    return [
        f"Load {load}, mean completion time over that of class mean\n\n{table(record, load)}"
        for load in record["configuration"]["loads"]
    ]


def tails(record: dict) -> str:
    """As Markdown: P95 at the highest load."""
    load = record["configuration"]["loads"][-1]
    said = f"Load {load}, P95 of completion time over that of class mean"
    return f"{said}\n\n{table(record, load, 'p95_seconds')}"


def worth(record: dict) -> str:
    """As Markdown: seconds with the finest labels and with coarser ones, at the highest load."""
    load = record["configuration"]["loads"][-1]
    found = [each for each in record["found"] if each["load"] == load]
    named = ("class mean", "LAS", "Gittins", "oracle")
    lines = [
        f"Load {load}, mean completion time in seconds\n",
        f"| mix | labels | {' | '.join(named)} |",
        "| --- | --- |" + " ---: |" * len(named),
    ]
    for each in found:
        if sum(other["mix"] == each["mix"] for other in found) > 1:
            seconds = [each["rows"][name]["mean_seconds"]["estimate"] for name in named]
            cells = " | ".join(f"{one:,.0f}" for one in seconds)
            lines.append(f"| {each['mix']} | {each['labels']} | {cells} |")
    return "\n".join(lines)


def figure(record: dict, path: Path) -> None:
    """Mean over class mean, a row a mix and labelling, at the highest load."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    load = record["configuration"]["loads"][-1]
    shown = [found for found in record["found"] if found["load"] == load]
    colors = {"LAS": "#e0a030", "SERPT": "#79b4e3", "Gittins": "#1d4f91", "oracle": "#c8553d"}
    canvas, ax = plt.subplots(figsize=(9.0, 0.42 * len(shown) + 1.6), layout="constrained")
    for at, found in enumerate(reversed(shown)):
        for shift, (name, color) in enumerate(colors.items()):
            ratio = found["rows"][name]["mean_seconds_over_class mean"]
            y = at + 0.16 * (1.5 - shift)
            ax.plot([ratio["low"], ratio["high"]], [y, y], color=color, linewidth=1.5)
            ax.plot(ratio["estimate"], y, "o", color=color, markersize=4)
    ax.axvline(1.0, color="#b0b0b0", linewidth=1, zorder=0)
    names = [f"{found['mix']}; labels: {found['labels']}" for found in reversed(shown)]
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_xscale("log")
    ticks = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ran = record["configuration"]
    canvas.supxlabel(
        f"mean completion time over class mean's with the same labels, load {load} "
        f"(95 % over {ran['seeds']} seeds of {ran['jobs']:,} jobs)",
        fontsize=9,
    )
    handles = [plt.Line2D([], [], color=color, marker="o", label=name)
               for name, color in colors.items()]  # fmt: skip
    canvas.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    canvas.savefig(path, dpi=120)
    plt.close(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.7, 0.9])
    add_workers(parser)
    args = parser.parse_args()
    begun = time.perf_counter()
    found = []
    for mix in mixes(args.data):
        for labelling in mix.labels:
            found += [
                served(mix, labelling, load, args.jobs, args.seeds, args.workers)
                for load in args.loads
            ]
            print(f"{time.perf_counter() - begun:4.0f} s: {mix.name}, {labelling}", flush=True)
    record = {
        "configuration": {
            "jobs": args.jobs, "seeds": args.seeds, "loads": args.loads, "servers": 1,
            "split": "by time: the earlier half is known, the later half served",
        },
        "environment": environment(),
        "found": found,
        "seconds": time.perf_counter() - begun,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "knowing_demand.json").write_text(json.dumps(record, indent=1) + "\n")
    figure(record, args.out / "knowing_demand.png")
    print("\n\n".join([*tables(record), worth(record), tails(record)]))


if __name__ == "__main__":
    main()
