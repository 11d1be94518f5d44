"""Sums up what link_evidence.py measured: a row an arm, the best arm of each budget, a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from quickstart_pages import markdown

if TYPE_CHECKING:
    from link_evidence import Way

BUDGETS = (0.02, 0.05, 0.15, 0.3)
RESAMPLES = 2000
Values = dict[str, NDArray[np.float64]]


class Sample:
    """Questions of several tasks, each task counting alike, with the resamples of intervals.

    Args:
        tasks: the task of each question.
        seed: of the resamples, which draw as many questions of each task as there are.
    """

    def __init__(self, tasks: Sequence[str], seed: int) -> None:
        named = np.array(tasks)
        names = sorted(set(tasks))
        self._weights = np.zeros(len(named))
        rng = np.random.default_rng(seed)
        draws = []
        for name in names:
            at = np.flatnonzero(named == name)
            self._weights[at] = 1 / len(at) / len(names)
            draws.append(rng.choice(at, size=(RESAMPLES, len(at))))
        self._draws = np.concatenate(draws, axis=1)

    def interval(self, values: NDArray[np.float64]) -> list[float]:
        """The mean over tasks of their means, and the ends of its 95 % bootstrap interval."""
        weighted = values * self._weights
        ends = np.quantile(weighted[self._draws].sum(axis=1), [0.025, 0.975])
        return [float(one) for one in (weighted.sum(), *ends)]

    def mean(self, values: NDArray[np.float64]) -> float:
        """The mean over tasks of their means."""
        return float((values * self._weights).sum())


def summary(record: dict[str, Any], ways: Sequence["Way"]) -> dict[str, Any]:
    """Means with intervals by task and over all, and the best arm of each budget."""
    questions, metrics = record["questions"], record["metrics"]
    seed = record["configuration"]["seed"]
    tasks = [one["task"] for one in questions]
    arms = ["full", *(way.label for way in ways)]
    values = {
        metric: {arm: np.array([one["arms"][arm][place] for one in questions]) for arm in arms}
        for place, metric in enumerate(metrics)
    }
    names = list(dict.fromkeys(sorted(tasks)))
    groups = {"all": list(range(len(tasks)))}
    groups |= {name: [i for i, task in enumerate(tasks) if task == name] for name in names}
    rows = []
    for group, at in groups.items():
        sample = Sample([tasks[i] for i in at], seed)
        for way in [None, *ways]:
            arm = "full" if way is None else way.label
            row: dict[str, Any] = {"task": group, "arm": arm, "questions": len(at)}
            if way is not None:
                row |= {"family": way.family, "behind": way.behind, "budget": way.budget}
            for metric in metrics:
                row[metric] = sample.interval(values[metric][arm][at])
            if way is not None and way.twin:
                minus = values["extra_nll"][arm] - values["extra_nll"][way.twin]
                row |= {"twin": way.twin, "minus_twin": sample.interval(minus[at])}
            rows.append(row)
    kept = {name: record[name] for name in ("configuration", "environment", "seconds")}
    tokens = {
        name: [float(np.mean([questions[i]["prompt_tokens"] for i in at])), len(at)]
        for name, at in groups.items()
    }
    chosen = best(values, questions, ways, seed)
    return kept | {"metrics": metrics, "prompt_tokens": tokens, "best": chosen, "rows": rows}


def best(
    values: dict[str, Values], questions: list[dict], ways: Sequence["Way"], seed: int
) -> list[dict]:
    """The arm nearest to full prefill at each budget, chosen on one half, reported on the other.

    By the divergence, since a wrong answer may by chance be likelier than under full prefill.
    A budget is a share of the prompt's tokens that are recomputed besides its query; what an arm
    recomputed is read from the half it is chosen on, too. What must measure the truth first is left
    out.
    """
    found = []
    halves = [np.array([q["number"] % 2 == half for q in questions]) for half in (0, 1)]
    if not all(half.any() for half in halves):
        return []  # of too few questions
    choose, report = (
        Sample([q["task"] for q, inside in zip(questions, half, strict=True) if inside], seed)
        for half in halves
    )
    kl, share = values["kl"], values["recomputed"]
    kinds = {
        "any": lambda way: True,
        "any, behind nothing": lambda way: way.behind == "nothing",
        "LegoLink": lambda way: way.family == "LegoLink" and way.behind == "nothing",
        "LegoLink, behind anything": lambda way: way.family == "LegoLink",
        "CacheBlend": lambda way: way.family == "CacheBlend",
        "random": lambda way: way.family == "random" and way.behind == "nothing",
    }
    for budget in BUDGETS:
        for kind, belongs in kinds.items():
            able = [
                way
                for way in ways
                if belongs(way)
                and way.family != "true deviation"
                and choose.mean((share[way.label] - share["naive"])[halves[0]]) <= 1.05 * budget
            ]
            if not able:
                continue
            means = {way.label: choose.mean(kl[way.label][halves[0]]) for way in able}
            arm = min(means, key=means.__getitem__)
            row = {"budget": budget, "among": kind, "arm": arm, "candidates": len(able)}
            row["chosen_on"] = means[arm]
            for metric in ("extra_nll", "kl", "accuracy"):
                row[metric] = report.interval(values[metric][arm][halves[1]])
            row["accuracy_full"] = report.mean(values["accuracy"]["full"][halves[1]])
            row["recomputed"] = report.mean((share[arm] - share["naive"])[halves[1]])
            row["minus_naive"] = report.interval((kl[arm] - kl["naive"])[halves[1]])
            twin = next(way.twin for way in able if way.label == arm)
            if twin:
                row |= {"twin": twin}
                row["minus_twin"] = report.interval((kl[arm] - kl[twin])[halves[1]])
            found.append(row)
    return found


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
            "twin": _spelled(row["minus_twin"], 3) if "twin" in row else "",
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
    }
    return markdown(lines, columns)


def tables(summed: dict[str, Any]) -> str:
    """What a run prints, and what stands in docs/linking.md."""
    where, asked = summed["environment"], summed["configuration"]
    counts = ", ".join(f"{n} of {task}" for task, (_, n) in summed["prompt_tokens"].items())
    said = (
        f"{asked['model']}, {counts} questions; {where['hardware']}, torch {where['torch']}, "
        f"transformers {where['transformers']}, float32, seed {asked['seed']}."
    )
    return "\n".join([best_table(summed), "", task_table(summed, "all"), "", said])


SHOWN = {
    ("random", "nothing"): ("grey", ":"),
    ("LegoLink", "nothing"): ("tab:green", "-"),
    ("LegoLink", "4 dummies"): ("tab:green", "--"),
    ("LegoLink", "the system prompt"): ("tab:olive", "--"),
    ("ProphetKV", "nothing"): ("tab:blue", "-"),
    ("ProphetKV", "1 dummy"): ("tab:blue", "--"),
    ("LegoLink-1 + ProphetKV", "nothing"): ("tab:purple", "-"),
    ("LegoLink-1 + ProphetKV", "4 dummies"): ("tab:purple", "--"),
    ("CacheBlend", "nothing"): ("tab:red", "-"),
    ("A3", "nothing"): ("tab:brown", "-"),
    ("true deviation", "nothing"): ("black", "-."),
}
"""Which arms the picture shows, by family and what they are behind; their colour and line."""


def draw(summed: dict[str, Any], path: Path) -> None:
    """Extra loss against the tokens recomputed and against the operations, over all tasks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, metric, what in (
        (axes[0], "recomputed", "tokens recomputed, query included"),
        (axes[1], "operations", "operations, what was measured to choose included"),
    ):
        for (family, behind), (colour, line) in SHOWN.items():
            rows = [
                row
                for row in summed["rows"]
                if row["task"] == "all"
                and (row.get("family"), row.get("behind")) == (family, behind)
            ]
            rows.sort(key=lambda row: row[metric][0])
            label = family + ("" if behind == "nothing" else f", behind {behind}")
            axis.plot(
                [100 * row[metric][0] for row in rows],
                [row["extra_nll"][0] for row in rows],
                line,
                color=colour,
                marker=".",
                label=label,
            )
        axis.set_xscale("log")
        axis.set_xticks([3, 5, 10, 20, 40, 100], ["3", "5", "10", "20", "40", "100"])
        axis.set_xlabel(f"% of a full prefill's {what}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("extra nats a token of the right answer")
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
