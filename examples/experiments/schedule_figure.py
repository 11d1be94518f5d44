"""The picture of `scheduling.json`, which schedule.py writes.

python examples/experiments/schedule_figure.py docs/results/scheduling.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

COLORS = {"nothing": "#8a8a8a", "distribution": "#2f6db5", "truth": "#c8553d"}
LINES = {"request FCFS": ("#bdbdbd", "-"), "FCFS": ("#6b6b6b", "-"), "LAS": ("#e0a030", "-"),
         "class mean": ("#79b4e3", "-"), "Gittins": ("#1d4f91", "--"),
         "oracle": ("#c8553d", ":")}  # fmt: skip


def figure(record: dict, path: Path) -> None:
    """Completion times relative to FCFS, a panel a workload; beside them load and deadlines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [each for each in record["scenarios"] if not has_deadlines(each)]
    names = [row["policy"] for row in panels[0]["rows"]]
    columns = -(-len(panels) // 2)
    canvas = plt.figure(figsize=(3.1 * columns + 5.5, 9.5), layout="constrained")
    grid = canvas.add_gridspec(2, columns + 1, width_ratios=[*[1] * columns, 1.25])
    first = None
    for at, panel in enumerate(panels):
        ax = canvas.add_subplot(grid[divmod(at, columns)], sharex=first)
        first = first or ax
        completion_times(ax, panel, names, labels=at % columns == 0)
    against_load(canvas.add_subplot(grid[0, -1]), record["loads"])
    for panel in filter(has_deadlines, record["scenarios"]):
        deadlines(canvas.add_subplot(grid[1, -1]), panel)
    handles = [
        plt.Line2D([], [], marker="o", color="#555555", linestyle="", label="mean"),
        plt.Line2D([], [], marker="D", color="#555555", markerfacecolor="white", linestyle="",
                   label="P95"),
        *(plt.Line2D([], [], color=color, linewidth=4, label=f"knows {what}")
          for what, color in COLORS.items()),
    ]  # fmt: skip
    canvas.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    ran = record["configuration"]
    canvas.suptitle(
        "Completion time relative to FCFS; one server, preemption at no cost, unless it says "
        f"engine (95 % intervals over {len(ran['seeds'])} paired seeds of {ran['jobs']:,} jobs, "
        f"engines {ran['engine_jobs']:,})"
    )
    canvas.savefig(path, dpi=120)
    plt.close(canvas)


def has_deadlines(scenario: dict) -> bool:
    return "deadline_hits" in scenario["rows"][0]


def completion_times(ax: Any, panel: dict, names: list[str], labels: bool) -> None:
    """Mean and P95 of each policy, on a log axis."""
    ax.axvline(1.0, color="#b0b0b0", linewidth=1, zorder=0)
    by_policy(ax, names, labels)
    for row in panel["rows"]:
        for shown, marker, filled in (("p95", "D", False), ("mean", "o", True)):
            interval(ax, row, f"{shown}_seconds_over_fcfs", marker, filled)
    ax.set_title(panel["title"], fontsize=10)
    ax.set(xscale="log")
    ax.set_xticks([0.03, 0.1, 0.3, 1.0, 3.0], ["0.03", "0.1", "0.3", "1", "3"])
    ax.minorticks_off()


def deadlines(ax: Any, panel: dict) -> None:
    """Share of the deadlines that each policy meets."""
    by_policy(ax, [row["policy"] for row in panel["rows"]], labels=True)
    for row in panel["rows"]:
        interval(ax, row, "deadline_hits", "s", filled=True)
    ax.set_title(panel["title"], fontsize=10)
    ax.set(xlabel="deadlines met", xlim=(0, 1.02))
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])


def interval(ax: Any, row: dict, entry: str, marker: str, filled: bool) -> None:
    value, color = row[entry], COLORS[row["knows"]]
    ax.plot([value["low"], value["high"]], [row["policy"]] * 2, color=color, linewidth=1.5)
    ax.plot([value["estimate"]], [row["policy"]], marker, color=color, markersize=6,
            markerfacecolor=color if filled else "white")  # fmt: skip


def by_policy(ax: Any, names: list[str], labels: bool) -> None:
    ax.plot([], [])
    ax.yaxis.update_units(names)
    ax.set_yticks(range(len(names)), names if labels else [""] * len(names), fontsize=9)
    ax.set_ylim(len(names) - 0.5, -0.5)
    tidy(ax)


def against_load(ax: Any, swept: list[dict]) -> None:
    """Mean completion time on the Hermes mix, with the intervals as bands."""
    from matplotlib import ticker

    x = [each["load"] for each in swept]
    for name, (color, style) in LINES.items():
        rows = [next(row for row in each["rows"] if row["policy"] == name) for each in swept]
        means = [row["mean_seconds"] for row in rows]
        ax.plot(x, [mean["estimate"] for mean in means], style, color=color, label=name,
                linewidth=2.2)  # fmt: skip
        ax.fill_between(x, [mean["low"] for mean in means], [mean["high"] for mean in means],
                        color=color, alpha=0.15, linewidth=0)  # fmt: skip
    ax.set_title("Hermes mix against load", fontsize=10)
    ax.set(yscale="log", xlabel="load", ylabel="mean completion time, s")
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=9)
    tidy(ax)


def tidy(ax: Any) -> None:
    ax.grid(color="#eeeeee")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(length=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="scheduling.json")
    chosen = parser.parse_args().results
    figure(json.loads(chosen.read_text()), chosen.with_suffix(".png"))
