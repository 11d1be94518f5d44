"""What link_evidence.py prints and draws of its summary: tables, and EPIC's picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from link_ways import NOTHING
from quickstart_pages import markdown
from two_sizes import in_both


def _spelled(interval: list[float], digits: int = 2) -> str:
    mean, low, high = (f"{one:+.{digits}f}" for one in interval)
    return f"{mean} [{low}, {high}]"


def best_table(summed: dict[str, Any]) -> str:
    """The best arm of each budget, on the questions it was not chosen on."""
    lines = [
        {
            "budget": f"{100 * row['budget']:.0f}%",
            "among": row["among"],
            "arm": row["arm"],
            "share": f"{100 * row['recomputed']:.1f}%",
            "nll": _spelled(row["extra_nll"]),
            "kl": _spelled(row["kl"], 3).replace("+", ""),
            "twin": _spelled(row["kl_minus_twin"], 3) if "twin" in row else "",
            "questions": row["questions"],
            "right": f"{100 * row['accuracy'][0]:.0f}% of {100 * row['accuracy_full']:.0f}%",
        }
        for row in summed["best"]
    ]
    columns = {
        "budget": "{budget}",
        "best of": "{among}",
        "arm": "{arm}",
        "recomputed besides the query": "{share}",
        "KL": "{kl}",
        "KL minus random's": "{twin}",
        "extra nats a token": "{nll}",
        "right": "{right}",
        "questions": "{questions}",
    }
    return markdown(lines, columns)


def task_table(summed: dict[str, Any], task: str) -> str:
    """All arms on one task, or over all."""
    lines = []
    for row in summed["rows"]:
        if row["task"] != task:
            continue
        lines.append(
            {
                "arm": row["arm"],
                "share": f"{100 * row['recomputed'][0]:.1f}%",
                "work": f"{100 * row['operations'][0]:.1f}%",
                "nll": _spelled(row["extra_nll"]),
                "twin": _spelled(row["minus_twin"]) if "twin" in row else "",
                "kl": f"{row['kl'][0]:.3f}",
                "ms": f"{1e3 * row['first_token_seconds']:.1f}" if _timed(row) else "",
                "questions": row["questions"],
                "right": f"{100 * row['accuracy'][0]:.0f}%",
            }
        )
    columns = {
        "arm": "{arm}",
        "recomputed": "{share}",
        "operations": "{work}",
        "extra nats a token": "{nll}",
        "minus random": "{twin}",
        "KL": "{kl}",
        "right": "{right}",
        "ms to first token": "{ms}",
        "questions": "{questions}",
    }
    return markdown(lines, columns)


def _timed(row: dict[str, Any]) -> bool:
    return "first_token_seconds" in row


def best(summed: dict[str, Any]) -> str:
    """What stands in docs/linking.md first."""
    return f"{best_table(summed)}\n\n{_where(summed)}"


def pairs(summed: dict[str, Any]) -> str:
    """What stands there second: arms set against each other."""
    lines = [
        {
            "arm": row["arm"],
            "against": row["against"],
            "kl": _spelled(row["kl"], 3),
            "nll": _spelled(row["extra_nll"]),
            "questions": row["questions"],
        }
        for row in summed["pairs"]
    ]
    columns = {
        "arm": "{arm}",
        "less": "{against}",
        "KL": "{kl}",
        "extra nats a token": "{nll}",
        "questions": "{questions}",
    }
    return markdown(lines, columns)


def beside(small: dict[str, Any], large: dict[str, Any]) -> str:
    """KL to full prefill over all tasks of the arms of a smaller run, beside a larger one's.

    Of those that link, on every question that was asked.
    """
    _, asked = small["prompt_tokens"]["all"]
    table = in_both(distances(small), distances(large))
    return f"{table}\n\nSmall: {asked} questions; {small['environment']['hardware']}."


def two_leads(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The same of two runs on the same questions, behind one lead and another."""
    names = tuple(f'KL behind "{run["configuration"]["lead"]}"' for run in (one, other))
    return in_both(distances(one), distances(other), names=names)


def distances(run: dict[str, Any]) -> dict[str, float]:
    """Of each way that was measured on every question its KL to full prefill over all tasks."""
    every = ("all", run["prompt_tokens"]["all"][1])
    return {
        row["arm"]: row["kl"][0]
        for row in run["rows"]
        if (row["task"], row["questions"]) == every and "family" in row
    }


def tables(summed: dict[str, Any]) -> str:
    """What a run prints: the best arms, and all of them over all tasks."""
    return "\n".join([best_table(summed), "", task_table(summed, "all"), "", _where(summed)])


def _where(summed: dict[str, Any]) -> str:
    where, asked = summed["environment"], summed["configuration"]
    counts = ", ".join(f"{n} of {task}" for task, (_, n) in summed["prompt_tokens"].items())
    asked_for = sum(asked["tasks"].values())
    return (
        f"{asked['model']}, {counts} questions, of {asked_for} in all; {where['hardware']}, "
        f"torch {where['torch']}, transformers {where['transformers']}, float32, "
        f"seed {asked['seed']}."
    )


SHOWN = {
    ("random", "nothing"): ("grey", ":"),
    ("LegoLink", "nothing"): ("tab:green", "-"),
    ("LegoLink", "4 dummies"): ("tab:green", "--"),
    ("LegoLink", "the system prompt"): ("tab:olive", "--"),
    ("ProphetKV", "nothing"): ("tab:blue", "-"),
    ("ProphetKV", "the system prompt"): ("tab:cyan", "--"),
    ("LegoLink-4 + ProphetKV", "nothing"): ("tab:purple", "-"),
    ("CacheBlend", "nothing"): ("tab:red", "-"),
    ("A3", "nothing"): ("tab:brown", "-"),
    ("true deviation", "nothing"): ("black", "-."),
}
"""Which arms the picture shows, by family and what they are behind; their colour and line."""


def draw(summed: dict[str, Any], path: Path) -> None:
    """KL to full prefill against tokens recomputed, operations and time, over all tasks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5.5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    every = [row for row in summed["rows"] if row["task"] == "all" and "family" in row]
    panels = {
        "% of a full prefill's tokens recomputed, query included": _percent("recomputed"),
        "% of its operations, what was measured to choose included": _percent("operations"),
        "ms to the first token, alone": lambda row: 1e3 * row["first_token_seconds"],
    }
    for axis, (what, place) in zip(axes, panels.items(), strict=True):
        timed = what.startswith("ms")
        for (family, behind), (colour, line) in SHOWN.items():
            rows = [
                row
                for row in every
                if (row["family"], row["behind"]) == (family, behind) and (_timed(row) or not timed)
            ]
            rows.sort(key=place)
            axis.plot(
                [place(row) for row in rows],
                [row["kl"][0] for row in rows],
                line,
                color=colour,
                marker=".",
                label=family + ("" if behind == NOTHING else f", behind {behind}"),
            )
        axis.set_xscale("log")
        axis.set_xlabel(what)
        axis.grid(alpha=0.3)
    for axis in axes[:2]:
        axis.set_xticks([3, 5, 10, 20, 40, 100], ["3", "5", "10", "20", "40", "100"])
    axes[2].set_xticks([12, 20, 40, 80], ["12", "20", "40", "80"], minor=False)
    axes[2].xaxis.set_minor_formatter("")
    axes[0].set_ylabel("KL to full prefill, nats")
    axes[0].set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def _percent(metric: str) -> Callable[[dict[str, Any]], float]:
    return lambda row: 100 * row[metric][0]
