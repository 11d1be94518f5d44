"""The picture of `prewarming.json`, which prewarming.py writes.

python examples/experiments/prewarming_figure.py docs/results/prewarming.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

FAMILIES = {
    "paper": ("K of the paper", "#1d4f91"),
    "artifact": ("threshold of the artifact", "#e0a030"),
    "cost-aware": ("price of idling", "#3c8d5a"),
}


def figure(record: dict, path: Path) -> None:
    """Cold starts of tools: what is saved against what idles, and both over the threshold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in record["rows"] if row["scenario"] == "tools" and not row["kept"]]
    canvas, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for family, (label, color) in FAMILIES.items():
        curve = [row for row in rows if row["family"] == family]
        x, y = [idle(row) for row in curve], [saved(row) for row in curve]
        left.plot(x, y, "o-", color=color, markersize=4, linewidth=1.2, label=label)
        for at in (0, len(curve) - 1):
            text = curve[at]["prewarmer"].split()[-1]
            left.annotate(text, (x[at], y[at]), color=color, fontsize=8, xytext=(5, -10),
                          textcoords="offset points")  # fmt: skip
        if family != "cost-aware":
            over_threshold(right, curve, label, color)
    for row, marker in zip(
        [row for row in rows if row["family"] == "baseline"], ("s", "^", "*"), strict=True
    ):
        left.errorbar(idle(row), saved(row), errors(row), fmt=marker, color="#555555",
                      markersize=9, capsize=2, label=row["prewarmer"])  # fmt: skip
    left.set(xlabel="idle warm seconds per job", ylabel="reduction of mean completion, %")
    right.set(xlabel="threshold", ylabel="reduction of mean completion, %", ylim=(0, None))
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, loc="lower right" if ax is left else "lower left")
    settings = record["configuration"]
    canvas.suptitle(
        "Containers and models with cold starts, Hermes mix under Gittins "
        f"(95 % intervals over {settings['seeds']} paired seeds of {settings['jobs']} jobs)"
    )
    canvas.savefig(path, dpi=120)
    plt.close(canvas)


def over_threshold(ax: Any, curve: list[dict], label: str, color: str) -> None:
    """Reduction with its interval."""
    thresholds = [float(row["prewarmer"].split()[-1]) for row in curve]
    low, high = ([100 * row["reduction"][end] for row in curve] for end in ("low", "high"))
    ax.plot(thresholds, [saved(row) for row in curve], "o-", color=color, markersize=4, label=label)
    ax.fill_between(thresholds, low, high, color=color, alpha=0.15, linewidth=0)


def idle(row: dict) -> float:
    return row["idle_seconds"]["estimate"]


def saved(row: dict) -> float:
    return 100 * row["reduction"]["estimate"]


def errors(row: dict) -> list[list[float]]:
    cut = row["reduction"]
    return [[100 * (cut["estimate"] - cut["low"])], [100 * (cut["high"] - cut["estimate"])]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    path = parser.parse_args().results
    figure(json.loads(path.read_text()), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
