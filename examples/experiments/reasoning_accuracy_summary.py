"""Sums up what reasoning_accuracy.py measured: a row an arm and budget, tables, a picture."""

from pathlib import Path
from typing import Any

import numpy as np
from link_evidence_summary import Sample
from quickstart_pages import markdown
from retention_evidence_summary import bars, said
from retention_ways import REASONING

DENSE = "dense"
METRICS = ("solved", "lines_right")
"""Share of problems whose chain is found whole; of lines without a wrong token, each behind the
taught ones. Means over problems."""
PAIRS = tuple(
    (f"{arm}, prompt pinned", f"{less}, prompt pinned")
    for arm, less in (
        ("RaaS", "H2O"),
        ("RaaS", "TOVA"),
        ("RaaS", "R-KV"),
        ("RaaS", "ShareRaaS"),
        ("RaaS", "RaaS, top half, pages of 4"),
        ("RaaS", "random"),
        ("RaaS", "random, a quarter at a time"),
        ("ShareRaaS", "H2O"),
        ("ShareRaaS", "random"),
        ("R-KV", "H2O"),
    )
)
"""Arms that are set against each other, on the problems that both take."""


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Means with intervals over the problems that an arm takes; of one that takes none nothing.

    `_minus_random` are over those that its twin takes as well, and `_in_common` over those that
    every arm takes at this budget, of which there are `in_common`.
    """
    seed = record["configuration"]["seed"]
    by_arm = {
        (row["arm"], row["budget"]): {one["problem"]: one for one in row["problems"]}
        for row in record["rows"]
    }
    twins = {way.label: way.twin for way in REASONING}
    common = {
        budget: sorted(
            set.intersection(
                *(set(marks) for (_, own), marks in by_arm.items() if own in (0, budget) and marks)
            )
        )
        for budget in {budget for _, budget in by_arm}
    }
    rows = []
    labels = [DENSE, *(way.label for way in REASONING)]
    ordered = sorted(by_arm.items(), key=lambda one: (one[0][1], labels.index(one[0][0])))
    for (arm, budget), marks in ordered:
        row: dict[str, Any] = {"arm": arm, "budget": budget, "problems": len(marks)}
        if marks:
            row["in_common"] = len(common[budget])
            twin = by_arm.get((twins.get(arm, ""), budget), {})
            both = sorted(marks.keys() & twin.keys())
            for name in METRICS:
                row[name] = interval([one[name] for one in marks.values()], seed)
                every = [marks[i][name] for i in common[budget]]
                row[f"{name}_in_common"] = interval(every, seed)
                if both:
                    apart = [marks[i][name] - twin[i][name] for i in both]
                    row[f"{name}_minus_random"] = interval(apart, seed)
        rows.append(row)
    tokens = np.array(list(record["tokens"].values()))
    kept = {name: record[name] for name in ("configuration", "environment", "seconds")}
    spread = {
        name: [int(tokens[:, i].min()), float(tokens[:, i].mean()), int(tokens[:, i].max())]
        for i, name in enumerate(("prompt_tokens", "chain_tokens"))
    }
    return kept | spread | {"rows": rows, "pairs": pairs(by_arm, seed)}


def pairs(by_arm: dict[tuple[str, int], dict[int, dict]], seed: int) -> list[dict[str, Any]]:
    """What the first arm of each of `PAIRS` solves more than the second, by budget."""
    found = []
    for arm, less in PAIRS:
        for budget in sorted({budget for _, budget in by_arm}):
            own, other = (by_arm.get((label, budget), {}) for label in (arm, less))
            both = sorted(own.keys() & other.keys())
            if both:
                apart = {
                    name: interval([own[i][name] - other[i][name] for i in both], seed)
                    for name in METRICS
                }
                row = {"arm": arm, "less": less, "budget": budget, "problems": len(both)}
                found.append(row | apart)
    return found


def interval(values: list[float], seed: int) -> list[float]:
    """The mean, and the ends of its 95 % bootstrap interval."""
    return Sample(["problems"] * len(values), seed).interval(np.array(values))


def tables(summed: dict[str, Any]) -> str:
    """Markdown, a table for each budget."""
    dense, *rows = summed["rows"]
    columns = {
        "taken": "{problems}",
        "solved": "{solved}",
        "less random's": "{solved_minus_random}",
        "lines right": "{lines_right}",
        "less its random's": "{lines_right_minus_random}",
    }
    parts = []
    for budget in sorted({row["budget"] for row in rows}):
        shown = [row for row in (dense, *rows) if row["budget"] in (0, budget)]
        taken = {row["problems"] for row in shown if row["problems"]}
        more = {}
        if len(taken) > 1:
            on = min(row["in_common"] for row in shown if "in_common" in row)
            more = {
                f"solved of the {on} that all take": "{solved_in_common}",
                "lines right there": "{lines_right_in_common}",
            }
        shown = [_row(row) for row in shown]
        parts.append(markdown(shown, {f"budget {budget}": "{arm}"} | columns | more))
    if summed["pairs"]:
        apart = [row | {name: said(row[name]) for name in METRICS} for row in summed["pairs"]]
        columns = {"arm": "{arm}", "less": "{less}", "budget": "{budget}", "solved": "{solved}",
                   "lines right": "{lines_right}", "problems": "{problems}"}  # fmt: skip
        parts.append(markdown(apart, columns))
    return "\n\n".join(parts)


def _row(row: dict[str, Any]) -> dict[str, str]:
    """The cells of a row; empty ones for what is not there."""
    cells = {"arm": row["arm"], "problems": str(row["problems"])}
    for name in METRICS:
        cells[name] = said(row.get(name), "")
        cells[f"{name}_minus_random"] = said(row.get(f"{name}_minus_random"))
        cells[f"{name}_in_common"] = said(row.get(f"{name}_in_common"), "")
    return cells


def draw(summed: dict[str, Any], path: Path) -> None:
    """Problems solved and lines right over the budget, of each arm that is no control.

    Of the problems that the arm takes there; a hollow mark tells that these are not all.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    controls = {way.label for way in REASONING if way.control}
    dense = next(row for row in summed["rows"] if row["arm"] == DENSE)
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in summed["rows"]) if arm != DENSE]
    budgets = sorted({row["budget"] for row in summed["rows"]} - {0})
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    for axis, name, what in zip(
        axes, ("solved", "lines_right"), ("problems solved", "lines without a wrong token"),
        strict=True,
    ):  # fmt: skip
        shown = [row for row in summed["rows"] if row["arm"] not in controls and name in row]
        if len(budgets) == 1:
            bars(axis, [(row["arm"], row[name]) for row in shown])
            axis.set(xlabel=f"{what}, budget {budgets[0]}")
            continue
        axis.axhline(dense[name][0], color="black", linestyle="--", label="dense")
        for index, arm in enumerate(arm for arm in arms if arm not in controls):
            own = sorted((row for row in shown if row["arm"] == arm), key=lambda row: row["budget"])
            look = {"color": f"C{index % 10}", "marker": "os^vD*Ph8<>"[index % 11]}
            some = [row for row in own if row["problems"] < dense["problems"]]
            every = [row for row in own if row not in some]
            for rows, fill in ((every, look["color"]), (some, "white")):
                if rows:  # no line where it would join other problems at each budget
                    axis.plot(
                        [row["budget"] for row in rows],
                        [row[name][0] for row in rows],
                        label=arm if rows is every or not every else None,
                        linewidth=1 if rows is every else 0,
                        markerfacecolor=fill,
                        **look,
                    )
        axis.set(xlabel="budget, tokens a KV head", ylabel=what, ylim=(-0.02, 1.02))
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, [str(budget) for budget in budgets])
    if len(budgets) > 1:
        lines, labels = axes[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
