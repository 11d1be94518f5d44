"""The picture of `decode.json`: milliseconds a token over the context, with the floors drawn in.

python examples/benchmarks/decode_figure.py docs/results
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from decode_tables import label, measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "dense eager": "#9a9a9a",
    "dense static": "#3a3a3a",
    "RaaS": "#2f8f5b",
    "Quest": "#4c72b0",
    "kvpress": "#c44e52",
}
STYLES = {"ours compiled": "o-", "ours eager": "o:", "kvpress": "s:", "dense static": "D-"}


def colour(row: dict) -> str:
    """By arm, and of ours by policy."""
    return COLOURS.get(row["arm"], COLOURS.get(row["policy"], "#8172b2"))


def draw(record: dict, path: Path) -> None:
    """Write the picture: batch 1 over contexts, and the tokens a second of batches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 5.5), layout="constrained", width_ratios=[3, 2]
    )
    _over_context(record, left)
    _in_batches(record, right)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _over_context(record: dict, ax: "Axes") -> None:
    rows = [r for r in measured(record) if r["batch"] == 1]
    lines: dict[str, list[dict]] = {}
    for row in rows:
        if row["context"]:
            lines.setdefault(label(row), []).append(row)
    for name, of_arm in lines.items():
        if len(of_arm) > 1:
            places = [row["context"] for row in of_arm]
            style = STYLES.get(of_arm[0]["arm"], "D:")
            ax.plot(
                places, [r["step_ms"] for r in of_arm], style, color=colour(of_arm[0]), label=name
            )
    for row in rows:
        if row["arm"] == "no attention":
            copied = record["calls"][row["call"]]["copy_bytes_a_second"]
            ax.axhline(row["step_ms"], color="black", linestyle="--", linewidth=1)
            ax.axhline(1e3 * row["bytes_a_step"] / copied, color="black", linewidth=1)
            ax.plot([], [], "k--", label="compiled forward without attention")
            ax.plot([], [], "k-", label="weights / copy bandwidth")
    contexts = sorted({row["context"] for row in rows if row["context"]})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(contexts, [f"{n:,}" for n in contexts])
    ax.set(xlabel="tokens seen", ylabel="ms a token inside generate", title="Batch 1")
    ax.grid(which="both", axis="y", alpha=0.3)
    if lines:
        ax.legend(fontsize=8)


def _in_batches(record: dict, ax: "Axes") -> None:
    rows = [r for r in measured(record) if r["batch"] > 1 and r["context"]]
    places = range(len(rows))[::-1]
    for place, row in zip(places, rows, strict=True):
        ax.barh(place, row["tokens_a_second"], color=colour(row))
    ax.set_yticks(
        places, [f"{label(r)}\nbatch {r['batch']}, {r['context']:,} seen" for r in rows], fontsize=8
    )
    ax.set(xlabel="tokens a second inside generate", title="Batches")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    draw(json.loads((folder / "decode.json").read_text()), folder / "decode.png")
