"""The three axes in pairs: arms are points, a method's budgets a line, the dominated grey."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.lines
from cap.arms import AT_REST, BOTH, FULL, LINK, RETAIN, STORE
from cap.summary import tested
from matplotlib.figure import Figure

COLOURS = {
    FULL: "black",
    LINK: "tab:blue",
    RETAIN: "tab:orange",
    STORE: "tab:green",
    BOTH: "tab:purple",
    AT_REST: "tab:red",
}
AXES = {
    "C": "C: longest context within both bounds, tokens",
    "A": "A: extra nats a token against full attention (0 and less are higher up)",
    "P": "P: tokens a second in time, times full attention's",
}
PANELS = (("C", "A"), ("P", "A"), ("C", "P"))


def place(row: dict[str, Any]) -> dict[str, list[float | None]]:
    """Where an arm stands with both bounds, as in the table: estimate and ends on each axis."""
    return {"C": row["context"]["both"], "A": row["extra_nll"], "P": row["speed"]["both"]}


def whisker(interval: list[float | None], longest: int) -> list[list[float]] | None:
    """How far the ends are from the estimate; an end beyond what was measured is at `longest`."""
    estimate, low, high = interval
    if estimate is None or low is None:
        return None
    return [[max(0.0, estimate - low)], [max(0.0, (longest if high is None else high) - estimate)]]


def size(row: dict[str, Any]) -> float:
    """What the budgets of one method are in order of: the number in what is written of it."""
    found = re.search(r"[0-9.]+", row["budget"])
    return float(found[0]) if found else 0.0


def draw(summed: dict[str, Any], path: Path) -> None:
    """Write the picture as `path`.png and `path`.svg."""
    rows = summed["rows"]
    told = tested(rows, summed["configuration"]["reference_context"])
    best = [row for row in told if not row["dominated"] and row["kind"] != FULL]
    best.sort(key=lambda row: (list(COLOURS).index(row["kind"]), row["label"]))
    numbers = {row["label"]: number for number, row in enumerate(best, 1)}
    figure = Figure(figsize=(15, 8.4), layout="constrained")
    curves = defaultdict(list)
    for row in told:
        curves[row["method"]].append(row)
    for axis, (across, up) in zip(figure.subplots(1, 3), PANELS, strict=True):
        for curve in curves.values():
            at = [place(row) for row in sorted(curve, key=size)]
            if len(at) > 1:
                axis.plot([one[across][0] for one in at], [one[up][0] for one in at],
                          color="lightgrey", zorder=1)  # fmt: skip
        for row in rows:
            ends, shown = place(row), row["label"] in numbers
            there = {letter: interval[0] for letter, interval in ends.items()}
            longest = max(map(int, row["requests"]))
            colour = COLOURS[row["kind"]] if shown or row["kind"] == FULL else "silver"
            full = row["kind"] == FULL
            axis.errorbar(there[across], there[up], xerr=whisker(ends[across], longest),
                          yerr=whisker(ends[up], longest), color=colour, linewidth=0.8,
                          alpha=0.8 if shown else 0.5, zorder=2 if shown else 1)  # fmt: skip
            marker = "*" if full else "o" if row in told else "x"
            axis.plot(there[across], there[up], marker, color=colour,
                      markersize=17 if full else 13 if shown else 5,
                      zorder=3 if shown or full else 2)  # fmt: skip
            if shown:
                axis.annotate(str(numbers[row["label"]]), (there[across], there[up]), color="white",
                              ha="center", va="center", fontsize=8, zorder=4)  # fmt: skip
        full = place(rows[0])
        axis.axvline(full[across][0], color="black", linewidth=0.7, linestyle=":")
        axis.axhline(full[up][0], color="black", linewidth=0.7, linestyle=":")
        if up == "A":
            axis.invert_yaxis()  # less is lost higher up, with the table's sign
        axis.set_xlabel(AXES[across], fontsize=11)
        axis.set_ylabel(AXES[up], fontsize=11)
        axis.grid(alpha=0.25)
    marks = [
        (COLOURS[row["kind"]], f"{numbers[row['label']]}  {row['label']} ({row['kind']})")
        for row in best
    ]
    handles = [
        matplotlib.lines.Line2D([], [], marker="o", linestyle="", color=colour, label=label)
        for colour, label in marks
    ]
    handles += [
        matplotlib.lines.Line2D([], [], marker="*", linestyle="", color="black", markersize=13,
                                label="full attention"),
        matplotlib.lines.Line2D([], [], marker="o", color="silver", markersize=5,
                                label="dominated: another is as good in all three (as estimated)"),
        matplotlib.lines.Line2D([], [], marker="x", linestyle="", color="silver", markersize=5,
                                label="of one request: no interval, dominates nothing"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9.5)
    figure.suptitle(
        "Right of and above the dotted lines is better than full attention; "
        "lines join the budgets of one method; "
        "whiskers are 95 % intervals"
    )
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=100)
