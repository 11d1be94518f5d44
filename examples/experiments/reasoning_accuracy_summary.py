"""Sums up what reasoning_accuracy.py measured: a row an arm and budget, tables, a picture."""

from pathlib import Path
from typing import Any

import numpy as np
from link_evidence_summary import Sample
from quickstart_pages import markdown
from retention_evidence_summary import said
from retention_ways import REASONING

DENSE = "dense"
METRICS = ("solved", "lines_right", "first_lines")
"""Share of problems whose chain is found whole; of lines without a wrong token, each behind the
taught ones; of lines before the first that has one. Means over problems."""


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Means over the problems that an arm does not refuse, with intervals paired with its twin."""
    seed = record["configuration"]["seed"]
    by_arm = {
        (row["arm"], row["budget"]): {one["problem"]: one for one in row["problems"]}
        for row in record["rows"]
    }
    twins = {way.label: way.twin for way in REASONING}
    rows = []
    for (arm, budget), marks in by_arm.items():
        row: dict[str, Any] = {"arm": arm, "budget": budget, "problems": len(marks)}
        if marks:
            for name in METRICS:
                row[name] = interval([one[name] for one in marks.values()], seed)
            twin = by_arm.get((twins.get(arm, ""), budget), {})
            if both := [number for number in marks if number in twin]:
                for name in METRICS:
                    apart = [marks[i][name] - twin[i][name] for i in both]
                    row[f"{name}_minus_random"] = interval(apart, seed)
        rows.append(row)
    tokens = np.array(list(record["tokens"].values()))
    kept = {name: record[name] for name in ("configuration", "environment", "seconds")}
    refused = [
        {"arm": row["arm"], "budget": row["budget"], "why": row["refused"]}
        for row in record["rows"]
        if "refused" in row
    ]
    spread = {
        name: [int(tokens[:, i].min()), float(tokens[:, i].mean()), int(tokens[:, i].max())]
        for i, name in enumerate(("prompt_tokens", "chain_tokens"))
    }
    return kept | spread | {"rows": rows, "refused": refused}


def interval(values: list[float], seed: int) -> list[float]:
    """The mean, and the ends of its 95 % bootstrap interval."""
    return Sample(["problems"] * len(values), seed).interval(np.array(values))


def tables(summed: dict[str, Any]) -> str:
    """Markdown: problems solved, lines right, and what random tokens in their place give."""
    found = {(row["arm"], row["budget"]): row for row in summed["rows"]}
    budgets = sorted({row["budget"] for row in summed["rows"]} - {0})
    arms = list(dict.fromkeys(row["arm"] for row in summed["rows"]))
    names = {
        "solved": "solved",
        "solved_minus_random": "solved, less random's",
        "lines_right": "lines without a wrong token",
        "lines_right_minus_random": "lines without a wrong token, less random's",
    }
    parts = []
    for name, heading in names.items():
        rows = []
        for arm in arms:
            cells = [found.get((arm, budget), found[DENSE, 0]) for budget in budgets]
            if arm != DENSE:
                cells = [found.get((arm, budget), {"problems": 0}) for budget in budgets]
            texts = [_cell(row, name, summed["configuration"]["problems"]) for row in cells]
            if any(texts):
                rows.append(
                    {"arm": arm} | {f"b{b}": t for b, t in zip(budgets, texts, strict=True)}
                )
        parts.append(markdown(rows, {heading: "{arm}"} | {str(b): f"{{b{b}}}" for b in budgets}))
    return "\n\n".join(parts)


def _cell(row: dict[str, Any], name: str, problems: int) -> str:
    """A number with its interval, and on how many problems where not on all."""
    if name not in row:
        return ""
    text = said(row[name], "+" if "random" in name else "")
    return text if row["problems"] == problems else f"{text}, of {row['problems']}"


def draw(summed: dict[str, Any], path: Path) -> None:
    """Problems solved and lines right over the budget, of each arm that is no control."""
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
        axis.axhline(dense[name][0], color="black", linestyle="--", label="dense")
        for index, arm in enumerate(arm for arm in arms if arm not in controls):
            own = sorted(
                (row for row in summed["rows"] if row["arm"] == arm and name in row),
                key=lambda row: row["budget"],
            )
            axis.plot(
                [row["budget"] for row in own],
                [row[name][0] for row in own],
                label=arm,
                color=f"C{index % 10}",
                marker="os^vD*PxX<>"[index % 11],
                linewidth=1,
            )
        axis.set(xlabel="budget, tokens a KV head", ylabel=what, ylim=(-0.02, 1.02))
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, [str(budget) for budget in budgets])
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
