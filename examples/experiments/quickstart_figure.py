"""The quickstart's picture: four questions, each answered by a panel."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY, RED, GREEN, BLUE = "#6e6e6e", "#c44e52", "#2f8f5b", "#4c72b0"


def colour(arm: str) -> str:
    """Grey for the reference and chance, red for reuse as it is, green for what the papers add."""
    if arm.startswith("LegoLink") or arm in ("RaaS", "Gittins"):
        return GREEN
    if arm == "naive":
        return RED
    return GREY if arm in ("full", "dense", "FCFS") or arm.startswith("random") else BLUE


def draw(record: dict, path: Path) -> None:
    """Write the picture of a record of `quickstart.py`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    _answers(record["linking"], axes[0, 0])
    _sinks(record["attention_on_first_tokens"], axes[0, 1])
    _retention(record["retention"], axes[1, 0])
    _scheduling(record["scheduling"], axes[1, 1])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(rows: list[dict], metric: str, notes: list[str], ax: "Axes") -> None:
    """A bar an arm with its interval, the first on top, and a note to its right."""
    places = range(len(rows))[::-1]
    beside = ax.get_yaxis_transform()
    for place, row, note in zip(places, rows, notes, strict=True):
        mean, (low, high) = row[metric], row[f"{metric}_interval"]
        spread = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        ax.barh(place, mean, xerr=spread, color=colour(row["arm"]), ecolor="black", capsize=2)
        ax.text(1.02, place, note, va="center", fontsize=8, transform=beside)
    ax.set_yticks(places, [row["arm"] for row in rows])


def _answers(rows: list[dict], ax: "Axes") -> None:
    cost = "{recomputed:.0%} recomputed, {time_of_full:.2f} of the time"
    _bars(rows, "accuracy", [cost.format(**row) for row in rows], ax)
    ax.set(
        xlim=(0, 1),
        xlabel="questions answered right (95 % interval)",
        title="Chunks compiled apart: are questions on them still answered?",
    )


def _sinks(layers: dict[str, list[float]], ax: "Axes") -> None:
    for arm, shares in layers.items():
        style = (
            dict(linestyle=(0, (4, 3)), linewidth=2) if arm == "full" else dict(marker="o", ms=3)
        )
        order = 3 if arm == "full" else 2  # it lies on LegoLink's line
        ax.plot(range(len(shares)), shares, color=colour(arm), label=arm, zorder=order, **style)
    ax.set(
        xlabel="layer",
        ylabel="share of the question's attention",
        ylim=(0, None),
        title="Why: attention on the first tokens of the chunks",
    )
    ax.legend()


def _retention(rows: list[dict], ax: "Axes") -> None:
    notes = [f"holds {row['kept_bytes'] / 2**20:.1f} MiB" for row in rows]
    _bars(rows, "extra_nll", notes, ax)
    ax.axvline(0.0, color="black", linewidth=0.8)
    ax.set(
        xlabel="nats a token above dense attention (95 % interval)",
        title="Decoding with part of the KV cache: what does it cost?",
    )


def _scheduling(rows: list[dict], ax: "Axes") -> None:
    mixes = list(dict.fromkeys(row["mix"] for row in rows))
    for index, mix in enumerate(mixes):
        of_mix = [row for row in rows if row["mix"] == mix]
        places = [place + 0.4 * index for place in range(len(of_mix))]
        ax.bar(places, [row["mean_to_fcfs"] for row in of_mix], 0.38, label=f"{mix}: mean")
        ax.plot(places, [row["p95_to_fcfs"] for row in of_mix], "k_", markersize=12)
    ax.plot([], [], "k_", label="P95")
    ax.set_xticks([place + 0.2 for place in range(len(of_mix))], [row["arm"] for row in of_mix])
    ax.tick_params(axis="x", labelrotation=20)
    ax.set(
        ylabel="completion time / first come, first served",
        title="Serving in another order: how long does it take?",
    )
    ax.legend(fontsize=8)
