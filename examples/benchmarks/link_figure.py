"""The picture of `link.json`: time to the first token over the prompt's length, with the floor.

python examples/benchmarks/link_figure.py docs/results
"""

import json
import sys
from pathlib import Path

from link_tables import label, measured

COLOURS = {
    "full prefill, sdpa": "#3a3a3a",
    "full prefill, flash": "#9a9a9a",
    "prefix caching": "#8172b2",
    "naive": "#ccb974",
    "LegoLink-16": "#2f8f5b",
    "LegoLink-16, compiled": "#8fd3a8",
    "CacheBlend 15 %": "#c44e52",
    "ProphetKV 15 %": "#4c72b0",
}


def draw(record: dict, path: Path) -> None:
    """Write the picture: single prompts, an arm a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(9, 6), layout="constrained")
    lines: dict[str, list[dict]] = {}
    for row in measured(record):
        if row["batch"] == 1:
            lines.setdefault(label(row), []).append(row)
    for name, rows in lines.items():
        places = [row["tokens"] for row in rows]
        times = [1e3 * row["first_token_seconds"] for row in rows]
        if rows[0]["arm"] == "floor":
            ax.plot(
                places, times, "k--", linewidth=1, label="floor: rows without attention, a copy"
            )
        elif len(rows) > 1:
            style = "o-" if rows[0]["tier"] in ("", "device") else "s:"
            ax.plot(places, times, style, color=COLOURS[rows[0]["arm"]], label=name)
    ticks = sorted({row["tokens"] for rows in lines.values() for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
    ax.set(xlabel="tokens of the prompt", ylabel="ms to the first token")
    ax.grid(which="both", axis="y", alpha=0.3)
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    draw(json.loads((folder / "link.json").read_text()), folder / "link.png")
