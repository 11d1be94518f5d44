"""Sums up what retention_evidence.py measured: a row an arm, the best settings, a picture."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from link_evidence_summary import Sample
from numpy.typing import NDArray
from quickstart_pages import markdown
from retention_texts import KINDS
from retention_ways import WAYS
from two_sizes import in_both

LEAST = 4
"""Texts of a kind, or answers, from which on there is an interval: one of fewer is too narrow."""

METRICS = ("extra_nll", "kl", "agreement")
DENSE = "full"
"""The arm whose free answers the others' are set against."""
PAIRS = (
    ("ShareRaaS, 4 sinks", "RaaS, top half, pages of 4, 4 sinks"),
    ("ShareRaaS, 4 sinks", "H2O, no sinks"),
    ("ShareRaaS, 4 sinks", "Quest"),
    ("ShareRaaS, 4 sinks", "SnapKV, decoding too, no sinks"),
    ("ShareRaaS, 4 sinks", "VaSE, 4 sinks"),
    ("ShareRaaS, 4 sinks", "R-KV, no sinks"),
    ("RaaS, prompt pinned", "H2O, no sinks"),
    ("RaaS, prompt pinned", "StreamingLLM, 4 sinks"),
    ("RaaS, prompt pinned", "RaaS, 4 sinks"),
    ("RaaS, ties by score, 4 sinks", "RaaS, 4 sinks"),
    ("RaaS, top half, pages of 4, 4 sinks", "H2O, no sinks"),
    ("RaaS, top half, pages of 4, 4 sinks", "StreamingLLM, 4 sinks"),
    ("LazyEviction, ties by score, 4 sinks", "LazyEviction, no sinks"),
    ("LazyEviction, ties by score, 4 sinks", "LazyEviction, 4 sinks"),
    ("StreamingLLM, 4 sinks", "StreamingLLM, no sinks"),
)
"""Arms that are set against each other, on the texts that nothing was chosen on."""
Measured = dict[tuple[str, int], dict[str, NDArray[np.float64]]]
"""By arm and budget: each metric, `[texts, stretches]`."""


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Means with intervals by kind of text, the best settings of each policy, and free answers."""
    seed = record["configuration"]["seed"]
    forced: Measured = {
        (row["arm"], row["budget"]): {name: np.array(row[name]) for name in METRICS}
        for row in record["rows"]
        if row["kind"] == "forced" and "refused" not in row
    }
    texts = record["configuration"]["texts"]
    kinds = [KINDS[i % len(KINDS)] for i in range(texts)]
    rows = []
    for kind in ("both", *KINDS):
        at = [i for i in range(texts) if kind in ("both", kinds[i])]
        sample = Estimate([kinds[i] for i in at], seed)
        for (arm, budget), values in forced.items():
            row: dict[str, Any] = {"texts": kind, "arm": arm, "budget": budget}
            for name in METRICS:
                row[name] = sample(values[name][at].mean(1))
            row["by_stretch"] = values["extra_nll"][at].mean(0).tolist()
            twin = forced.get((twins()[arm], budget))
            if twin is not None:
                apart = values["extra_nll"] - twin["extra_nll"]
                row["minus_random"] = sample(apart[at].mean(1))
            rows.append(row)
    refused = [row for row in record["rows"] if "refused" in row]
    answers = {
        row["arm"]: row for row in record["rows"] if row["kind"] == "free" and "refused" not in row
    }
    free = []
    for arm, row in answers.items():
        told = {"arm": arm, "budget": row["budget"], "decoding": row["decoding"]}
        for name in ("length", "repeated"):
            told[name] = mean_of(row[name], seed)
            if arm != DENSE and DENSE in answers:
                apart = np.subtract(row[name], answers[DENSE][name])
                told[f"{name}_minus_full"] = mean_of(apart, seed)
        free.append(told)
    kept = {name: record[name] for name in ("configuration", "environment", "seconds")}
    best = chosen(forced, kinds, seed)
    measured = {"chosen": best, "pairs": pairs(forced, kinds, seed), "rows": rows, "free": free}
    return kept | measured | {"refused": refused}


def twins() -> dict[str, str]:
    """The arm that evicts at random beside each arm; empty for none."""
    return {way.label: way.twin for way in WAYS}


def mean_of(values: Sequence[float] | np.ndarray, seed: int) -> list[float]:
    """Mean over answers, with its interval where there are `LEAST`."""
    return Estimate(["answers"] * len(values), seed)(np.array(values, dtype=float))


class Estimate:
    """A mean over kinds of their means, as `Sample` gives it; an interval where there are enough.

    Args:
        kinds: of each text.
        seed: of the resamples.
    """

    def __init__(self, kinds: list[str], seed: int) -> None:
        self._sample = Sample(kinds, seed)
        self._enough = min(Counter(kinds).values()) >= LEAST

    def __call__(self, values: NDArray[np.float64]) -> list[float]:
        """The mean, and where a kind has `LEAST` texts the ends of its 95 % bootstrap interval."""
        return self._sample.interval(values) if self._enough else [self._sample.mean(values)]


def chosen(forced: Measured, kinds: list[str], seed: int) -> list[dict]:
    """Of each policy the setting with the least loss, by budget.

    It is chosen on half of the texts of each kind and reported on the other, with the paired
    difference to the policy's default. Of a policy with one setting that one is reported.
    """
    halves = halves_of(kinds)
    if not halves:
        return []
    choose = Sample([kinds[i] for i in halves[0]], seed)
    report = Estimate([kinds[i] for i in halves[1]], seed)
    found = []
    for family in dict.fromkeys(way.family for way in WAYS):
        ways = [way for way in WAYS if way.family == family and not way.control]
        default = next(way.label for way in ways if way.default)
        for budget in sorted({budget for _, budget in forced}):
            loss = {
                way.label: forced[way.label, budget]["extra_nll"]
                for way in ways
                if (way.label, budget) in forced
            }
            if default not in loss:
                continue
            best = min(loss, key=lambda arm: choose.mean(loss[arm][halves[0]].mean(1)))
            reported, usual = (loss[arm][halves[1]] for arm in (best, default))
            found.append(
                {
                    "policy": family,
                    "budget": budget,
                    "settings": len(loss),
                    "arm": best,
                    "default": default,
                    "extra_nll": report(reported.mean(1)),
                    "of_default": report(usual.mean(1)),
                    "minus_default": report((reported - usual).mean(1)),
                    "by_stretch": reported.mean(0).tolist(),
                }
            )
    return found


def halves_of(kinds: list[str]) -> list[list[int]]:
    """Every other pair of texts, one of each kind, and the pairs between; none of too few."""
    halves = [[i for i in range(len(kinds)) if i // len(KINDS) % 2 == half] for half in (0, 1)]
    return halves if min(map(len, halves)) >= LEAST * len(KINDS) else []


def pairs(forced: Measured, kinds: list[str], seed: int) -> list[dict]:
    """Of each of `PAIRS` at each budget the first arm's loss less the second's."""
    halves = halves_of(kinds)
    if not halves:
        return []
    report = Estimate([kinds[i] for i in halves[1]], seed)
    found = []
    for arm, against in PAIRS:
        for budget in sorted({budget for _, budget in forced}):
            if (arm, budget) in forced and (against, budget) in forced:
                apart = forced[arm, budget]["extra_nll"] - forced[against, budget]["extra_nll"]
                less = report(apart[halves[1]].mean(1))
                found.append({"arm": arm, "against": against, "budget": budget, "extra_nll": less})
    return found


def tables(summed: dict[str, Any]) -> str:
    """Markdown: the settings chosen, arms in pairs, loss by arm and budget, free answers."""
    budgets = sorted({row["budget"] for row in summed["rows"]})
    found = {(row["texts"], row["arm"], row["budget"]): row for row in summed["rows"]}
    arms = [way.label for way in WAYS if any(row["arm"] == way.label for row in summed["rows"])]

    def table(first: str, kind: str, cell: Callable[[dict], str]) -> str:
        rows = [
            {"arm": arm}
            | {f"b{b}": cell(found[kind, arm, b]) for b in budgets if (kind, arm, b) in found}
            for arm in arms
        ]
        rows = [{f"b{b}": "" for b in budgets} | row for row in rows if any(list(row.values())[1:])]
        return markdown(rows, {first: "{arm}"} | {str(b): f"{{b{b}}}" for b in budgets})

    columns = {
        "policy": "{policy}",
        "budget": "{budget}",
        "chosen": "{arm}",
        "nats a token above dense": "{loss}",
        "less its default's": "{less}",
    }
    rows = [
        row
        | {
            "loss": said(row["extra_nll"]),
            "less": "" if row["arm"] == row["default"] else said(row["minus_default"]),
        }
        for row in summed["chosen"]
    ]
    parts = [markdown(rows, columns)] if rows else []
    columns = {"arm": "{arm}", "less": "{against}", "budget": "{budget}", "nats a token": "{less}"}
    rows = [row | {"less": said(row["extra_nll"])} for row in summed["pairs"]]
    parts += [markdown(rows, columns)] if rows else []
    parts += [
        table(f"nats a token above dense, {kind}", kind, lambda row: said(row["extra_nll"]))
        for kind in KINDS
    ]
    parts.append(
        table(
            "less that of random with the same pages and interval",
            "both",
            lambda row: said(row.get("minus_random")),
        )
    )
    parts.append(table("agreement", "both", lambda row: said(row["agreement"], "")))
    rows = [
        {
            "arm": row["arm"],
            "tokens": f"{row['length'][0]:.0f}",
            "more": said(row.get("length_minus_full"), digits=0),
            "share": said(row["repeated"], ""),
            "above": said(row.get("repeated_minus_full")),
        }
        for row in summed["free"]
    ]
    columns = {
        "decoding freely": "{arm}",
        "tokens": "{tokens}",
        "less full's": "{more}",
        "share repeated": "{share}",
        "less full's share": "{above}",
    }
    if rows:
        parts.append(markdown(rows, columns))
    return "\n\n".join(parts)


def beside(small: dict[str, Any], large: dict[str, Any]) -> str:
    """Nats a token above dense of the arms of a smaller run, beside those of a larger one.

    Args:
        small: what `summary` gave of it, at one budget.
        large: likewise, at one budget or more, of which 256 is taken.
    """
    losses = [
        {
            row["arm"]: row["extra_nll"][0]
            for row in found["rows"]
            if row["texts"] == "both" and (found is small or row["budget"] == 256)
        }
        for found in (small, large)
    ]
    return in_both(*losses, "+.3f")


def said(interval: list[float] | None, sign: str = "+", digits: int = 3) -> str:
    """A mean with its interval, where it has one; nothing where there is none."""
    if interval is None:
        return ""
    mean, *ends = (f"{number:{sign}.{digits}f}" for number in interval)
    return f"{mean} ({' to '.join(ends)})" if ends else mean


def drawn(summed: dict[str, Any]) -> tuple[str, list[dict]]:
    """What `draw` shows, in words, and its rows: of each policy one at a budget.

    The settings chosen, on the texts that they were not chosen on; where there are too few texts
    to choose, each policy's default on all of them.
    """
    if summed["chosen"]:
        return "settings chosen on the other half of the texts", summed["chosen"]
    defaults = {way.label: way.family for way in WAYS if way.default}
    return "default settings", [
        row | {"policy": defaults[row["arm"]]}
        for row in summed["rows"]
        if row["texts"] == "both" and row["arm"] in defaults
    ]


def bars(axis: Any, rows: Sequence[tuple[str, list[float]]]) -> None:
    """Means with their intervals as bars, the smallest at the bottom.

    Args:
        axis: of matplotlib.
        rows: a label, and a mean with or without the ends of its interval.
    """
    ordered = sorted(rows, key=lambda row: row[1][0])
    for place, (_, (mean, *ends)) in enumerate(ordered):
        axis.barh(place, mean, color="lightsteelblue")
        if ends:
            axis.plot(ends, [place, place], color="black", linewidth=1)
    axis.set_yticks(range(len(ordered)), [label for label, _ in ordered], fontsize=8)


def draw(summed: dict[str, Any], path: Path) -> None:
    """Loss over the budget, and along the text at one budget, of one setting of each policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    what, rows = drawn(summed)
    budgets = sorted({row["budget"] for row in rows})
    if not rows:
        return
    shown = 256 if 256 in budgets else budgets[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    families = list(dict.fromkeys(way.family for way in WAYS))
    tokens = summed["configuration"]["tokens"]
    for index, family in enumerate(families):
        own = sorted((row for row in rows if row["policy"] == family), key=lambda r: r["budget"])
        if not own:
            continue
        style = dict(color=f"C{index % 10}", marker="os^vD*PxX<>"[index % 11], linewidth=1)
        left.plot(
            [row["budget"] for row in own if len(budgets) > 1],
            [max(row["extra_nll"][0], 1e-4) for row in own if len(budgets) > 1],
            label=family,
            **style,
        )
        for row in (row for row in own if row["budget"] == shown):
            step = tokens / len(row["by_stretch"])
            middles = [(i + 0.5) * step for i in range(len(row["by_stretch"]))]
            right.plot(middles, row["by_stretch"], **style)
    if len(budgets) == 1:
        bars(left, [(row["arm"], row["extra_nll"]) for row in rows])
        left.set(xlabel=f"nats a token above dense, budget {shown}")
    else:
        left.set(xlabel="budget, tokens a KV head", ylabel="nats a token above dense", yscale="log")
        left.set_xscale("log", base=2)
        left.set_xticks(budgets, [str(budget) for budget in budgets])
    right.set(xlabel=f"token of the text, budget {shown}")
    figure.suptitle(what, fontsize=9)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
