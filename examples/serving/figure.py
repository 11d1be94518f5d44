"""The picture of a record of `agents.py`: times by arm, and what each part contributes."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from serving.factorial import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY, GREEN, BLUE, RED = "#8a8a8a", "#2f8f5b", "#4c72b0", "#c44e52"


def draw(record: dict, path: Path) -> None:
    """Write the picture of a record."""
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    arms, parts, firsts = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    draw_arms(record, arms)
    draw_contributions(record, parts)
    draw_orders(record, firsts)
    figure.savefig(path, dpi=110)


def draw_arms(record: dict, ax: "Axes") -> None:
    """Mean and P95 completion of every arm, the longest mean on top."""
    rows = sorted(record["arms"], key=lambda row: statistics.fmean(row["mean_seconds"]))
    names = [row["arm"] for row in rows]
    means = [statistics.fmean(row["mean_seconds"]) for row in rows]
    colours = [GREEN if "link" in name else GREY for name in names]
    ax.barh(names, means, color=colours)
    ax.plot([row["p95_seconds"] for row in rows], names, "k|", ms=12, label="P95")
    for name, row in zip(names, rows, strict=True):
        ax.plot(row["mean_seconds"], [name] * len(row["mean_seconds"]), ".", color="black", ms=4)
    ax.plot([], [], ".", color="black", ms=4, label="mean of one stream")
    seconds = {"processor": "processor seconds", "wall": "seconds"}[
        record["configuration"]["clock"]
    ]
    ax.set(xlabel=f"{seconds} from arrival to completion", title="How long do applications take?")
    ax.legend(loc="lower right", fontsize=8)


def draw_contributions(record: dict, ax: "Axes") -> None:
    """Each part as a factor of the mean completion time, with its interval."""
    found = record["contributions"]["replayed at load 0.9"]
    labels = {
        **{f"{part} alone": f"{part} alone" for part in PARTS},
        "sum": "all three, if they added up",
        "measured": "all three, measured",
    }
    for place, (key, label) in enumerate(reversed(labels.items())):
        entry = found[key]
        colour = BLUE if key in ("sum", "measured") else GREEN
        ax.plot(entry["factor"], place, "o", color=colour)
        if entry["interval"]:
            ax.plot(entry["interval"], [place, place], color=colour)
        ax.text(entry["factor"], place + 0.15, f"{entry['factor']:.2f}", ha="center", fontsize=9)
        labels[key] = label
    ax.set_ylim(-0.5, len(labels) - 0.3)
    ax.set_yticks(range(len(labels)), list(reversed(labels.values())))
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.set_xscale("log")
    ticks = [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0]
    low, high = ax.get_xlim()
    shown = [tick for tick in ticks if low <= tick <= high]
    ax.set_xticks(shown, [f"{tick:g}" for tick in shown])
    ax.minorticks_off()
    ax.set(
        xlabel="mean completion / with nothing on, at load 0.9",
        title="What does each part contribute?",
    )


def draw_orders(record: dict, ax: "Axes") -> None:
    """Replays: mean completion of every order over that of FCFS."""
    cases = [
        case
        for case in dict.fromkeys((row["load"], row["arm"]) for row in record["replays"])
        if case[1] in ("none", "link + retention")
    ]
    orders = [o for o in dict.fromkeys(r["order"] for r in record["replays"]) if o != "FCFS"]
    for index, order in enumerate(orders):
        heights = []
        for case in cases:
            means = {
                row["order"]: row["means"]
                for row in record["replays"]
                if (row["load"], row["arm"]) == case
            }
            pairs = zip(means[order], means["FCFS"], strict=True)
            heights.append(statistics.fmean(a / b for a, b in pairs))
        places = [place + 0.2 * index for place in range(len(cases))]
        ax.bar(places, heights, 0.18, label=order, color=[GREY, BLUE, GREEN, RED][index])
    ax.set_xticks(
        [place + 0.3 for place in range(len(cases))],
        [
            f"{arm} at load {load:g}".replace(" + ", "\n+ ").replace(" at", "\nat")
            for load, arm in cases
        ],
        fontsize=8,
    )
    ax.axhline(1.0, color="black", linewidth=0.8)
    ax.set(ylabel="mean completion / FCFS", title="Which order? Replayed at two loads")
    ax.set_ylim(0.0, 1.35)  # room for the legend
    ax.legend(fontsize=8, ncols=2, loc="upper center")
