"""The three axes in pairs: arms are points, a method's budgets a line, the dominated grey."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.lines
from cap.arms import AT_REST, BOTH, FULL, LINK, RETAIN, STORE
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
    "A": "A: nats a token against full attention, up is better",
    "P": "P: tokens a second in time, times full attention's",
}
PANELS = (("C", "A"), ("P", "A"), ("C", "P"))


def place(row: dict[str, Any]) -> dict[str, float]:
    """Where an arm stands on the three axes; more is better on each."""
    return {
        "C": row["context"]["both"][0],
        "A": -row["extra_nll"][0],
        "P": row["speed"][0],
    }


def draw(summed: dict[str, Any], path: Path) -> None:
    """Write the picture as `path`.png and `path`.svg."""
    rows = summed["rows"]
    best = [row for row in rows if not row["dominated"] and row["kind"] != FULL]
    best.sort(key=lambda row: (list(COLOURS).index(row["kind"]), row["label"]))
    numbers = {row["label"]: number for number, row in enumerate(best, 1)}
    figure = Figure(figsize=(15, 8.4), layout="constrained")
    curves = defaultdict(list)
    for row in rows:
        curves[row["method"]].append(row)
    for axis, (across, up) in zip(figure.subplots(1, 3), PANELS, strict=True):
        for curve in curves.values():
            at = sorted((place(row) for row in curve), key=lambda there: (there["P"], there["C"]))
            if len(at) > 1:
                axis.plot([one[across] for one in at], [one[up] for one in at],
                          color="lightgrey", zorder=1)  # fmt: skip
        for row in rows:
            there, shown = place(row), row["label"] in numbers
            colour = COLOURS[row["kind"]] if shown or row["kind"] == FULL else "silver"
            full = row["kind"] == FULL
            axis.plot(there[across], there[up], "*" if full else "o", color=colour,
                      markersize=17 if full else 13 if shown else 5,
                      zorder=3 if shown or full else 2)  # fmt: skip
            if shown:
                axis.annotate(str(numbers[row["label"]]), (there[across], there[up]), color="white",
                              ha="center", va="center", fontsize=8, zorder=4)  # fmt: skip
        full = place(rows[0])
        axis.axvline(full[across], color="black", linewidth=0.7, linestyle=":")
        axis.axhline(full[up], color="black", linewidth=0.7, linestyle=":")
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
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9.5)
    figure.suptitle(
        "Right of and above the dotted lines is better than full attention; "
        "lines join the budgets of one method"
    )
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=100)
