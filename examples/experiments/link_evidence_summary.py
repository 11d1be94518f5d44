"""Sums up what link_evidence.py measured: a row for each arm, the best arm of each budget."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from link_ways import BOS_KEPT, NOTHING, SYSTEM
from numpy.typing import NDArray

if TYPE_CHECKING:
    from link_ways import Way

BUDGETS = (0.0, 0.02, 0.05, 0.15, 0.3)
RESAMPLES = 2000
FULL = "full"
PAIRS = (
    ("LegoLink-4 + ProphetKV 15 %", "ProphetKV 15 %"),
    ("LegoLink-1 + ProphetKV 5 %, 1 dummy", "ProphetKV 5 %"),
    ("true deviation 15 %", "ProphetKV 15 %"),
    ("CacheBlend 15 %", "ProphetKV 15 %"),
    ("CacheBlend 15 %", "LegoLink 32"),
    ("CacheBlend 5 %", "LegoLink 16"),
    (f"naive, {SYSTEM}", "LegoLink 4"),
    *((f"LegoLink {k}, {SYSTEM}", f"random {k} a chunk, {SYSTEM}") for k in (1, 4, 16)),
    ("LegoLink 1", "naive, 1 dummy"),
    ("naive, 4 dummies", "naive, 1 dummy"),
    (f"naive, {BOS_KEPT}", "naive"),
)
"""Arms that docs/linking.md sets against each other, on the questions that both have."""


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


class Measured:
    """What a record holds, by metric and arm; nan for a question that an arm was not measured on.

    Args:
        record: of `link_evidence.run`.
        ways: whose arms are looked at, besides full prefill.

    Attributes:
        tasks: the task of each question.
        odd: whether its number is odd.
        arms: names of all arms that some question was measured on.
    """

    def __init__(self, record: dict[str, Any], ways: Sequence["Way"]) -> None:
        self._questions, self._metrics = record["questions"], record["metrics"]
        self._seed = record["configuration"]["seed"]
        self.tasks = np.array([one["task"] for one in self._questions])
        self.odd = np.array([one["number"] % 2 == 1 for one in self._questions])
        known = {arm for one in self._questions for arm in one["arms"]}
        names = [FULL, f"{FULL}, {BOS_KEPT}", *(way.label for way in ways)]
        self.arms = [name for name in names if name in known]
        self._values: dict[tuple[str, str], NDArray[np.float64]] = {}
        self._samples: dict[bytes, Sample] = {}

    def __call__(self, metric: str, arm: str) -> NDArray[np.float64]:
        """One number for each question."""
        key = metric, arm
        if key not in self._values:
            place = self._metrics.index(metric)
            nothing = [np.nan] * len(self._metrics)
            self._values[key] = np.array(
                [one["arms"].get(arm, nothing)[place] for one in self._questions]
            )
        return self._values[key]

    def on(self, arms: Sequence[str], among: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which questions of some every one of these arms was measured on."""
        found = among.copy()
        for arm in arms:
            found &= ~np.isnan(self("kl", arm))
        return found

    def interval(self, values: NDArray[np.float64], at: NDArray[np.bool_]) -> list[float]:
        """See `Sample.interval`; of the questions marked."""
        return self._sample(at).interval(values[at])

    def mean(self, values: NDArray[np.float64], at: NDArray[np.bool_]) -> float:
        """See `Sample.mean`; of the questions marked."""
        return self._sample(at).mean(values[at])

    def _sample(self, at: NDArray[np.bool_]) -> Sample:
        key = at.tobytes()
        if key not in self._samples:
            self._samples[key] = Sample(list(self.tasks[at]), self._seed)
        return self._samples[key]


def summary(record: dict[str, Any], ways: Sequence["Way"]) -> dict[str, Any]:
    """Means with intervals by task and over all, and the best arm of each budget."""
    questions, metrics = record["questions"], record["metrics"]
    measured = Measured(record, ways)
    described = {way.label: way for way in ways}
    names = sorted(set(measured.tasks.tolist()))
    groups = {"all": np.ones(len(questions), dtype=bool)}
    groups |= {name: measured.tasks == name for name in names}
    rows = []
    for group, among in groups.items():
        for arm in measured.arms:
            at = measured.on([arm], among)
            if not at.any():
                continue
            row: dict[str, Any] = {"task": group, "arm": arm, "questions": int(at.sum())}
            way = described.get(arm)
            if way is not None:
                row |= {"family": way.family, "behind": way.behind, "budget": way.budget}
            for metric in metrics:
                row[metric] = measured.interval(measured(metric, arm), at)
            seconds = first_token(record, ways, arm)
            if seconds:
                row["first_token_seconds"] = float(np.median(seconds))
            if way is not None and way.twin:
                both = measured.on([arm, way.twin], among)
                minus = measured("extra_nll", arm) - measured("extra_nll", way.twin)
                row |= {"twin": way.twin, "minus_twin": measured.interval(minus, both)}
            rows.append(row)
    kept = {name: record[name] for name in ("configuration", "environment", "seconds")}
    lengths = np.array([one["prompt_tokens"] for one in questions])
    tokens = {name: [float(lengths[at].mean()), int(at.sum())] for name, at in groups.items()}
    return kept | {
        "metrics": metrics,
        "prompt_tokens": tokens,
        "best": best(measured, ways),
        "pairs": pairs(measured),
        "rows": rows,
    }


def pairs(measured: Measured) -> list[dict[str, Any]]:
    """Of each of `PAIRS`, the first arm's numbers less the second's, over all tasks."""
    found = []
    for arm, against in PAIRS:
        if arm not in measured.arms or against not in measured.arms:
            continue
        at = measured.on([arm, against], np.ones(len(measured.tasks), dtype=bool))
        row: dict[str, Any] = {"arm": arm, "against": against, "questions": int(at.sum())}
        for metric in ("kl", "extra_nll"):
            minus = measured(metric, arm) - measured(metric, against)
            row[metric] = measured.interval(minus, at)
        found.append(row)
    return found


def first_token(record: dict[str, Any], ways: Sequence["Way"], arm: str) -> list[float]:
    """Seconds to the first token of an arm, or of the same method behind other sinks."""
    seconds: dict[str, list[float]] = record["first_token_seconds"]
    if arm in seconds:
        return seconds[arm]
    way = next((way for way in ways if way.label == arm), None)
    if way is None:
        return []
    alike = (one.label for one in ways if one.method == way.method and one.timed)
    return seconds.get(next(alike, ""), [])


def best(measured: Measured, ways: Sequence["Way"]) -> list[dict]:
    """The arm nearest to full prefill at each budget, chosen on one half, reported on the other.

    By the divergence, since a wrong answer may by chance be likelier than under full prefill.
    Compared are arms that were measured on the same questions: those of a part of them, among
    themselves. A budget is a share of the prompt's tokens that are recomputed besides its query;
    what an arm recomputed is read from the half it is chosen on, too. What must measure the truth
    first is left out, and so are arms whose prompts have other tokens.
    """
    kinds = {
        "any": lambda way: True,
        "any, no system prompt": lambda way: way.behind != SYSTEM,
        "any, behind nothing": lambda way: way.behind == NOTHING,
        "LegoLink": lambda way: way.family == "LegoLink" and way.behind == NOTHING,
        "LegoLink, behind anything": lambda way: way.family == "LegoLink",
        "ProphetKV": lambda way: way.family == "ProphetKV" and way.behind == NOTHING,
        "CacheBlend": lambda way: way.family == "CacheBlend",
        "random": lambda way: way.family == "random" and way.behind == NOTHING,
    }
    able = {}  # what each arm recomputes, how far it is from full prefill, on how many questions
    for way in ways:
        at = measured.on(["naive", way.label], ~measured.odd)
        later = measured.on(["naive", way.label, way.twin or "naive"], measured.odd)
        if way.family != "true deviation" and way.behind != BOS_KEPT and at.any() and later.any():
            share = measured("recomputed", way.label) - measured("recomputed", "naive")
            far = measured.mean(measured("kl", way.label), at)
            able[way.label] = (way, measured.mean(share, at), far, int(at.sum()))
    found = []
    for budget in BUDGETS:
        for kind, belongs in kinds.items():
            most = max((n for way, _, _, n in able.values() if belongs(way)), default=0)
            within = [
                (far, label)
                for label, (way, share, far, n) in able.items()
                if belongs(way) and share <= 1.05 * budget + 1e-9 and n == most
            ]
            if within:
                way = able[min(within)[1]][0]
                found.append(
                    {"budget": budget, "among": kind, "candidates": len(within)}
                    | _reported(measured, way)
                )
    return found


def _reported(measured: Measured, way: "Way") -> dict[str, Any]:
    """What an arm shows on the questions it was not chosen on."""
    arm = way.label
    chosen_on = measured.on(["naive", arm], ~measured.odd)
    at = measured.on(["naive", arm, way.twin or "naive"], measured.odd)
    kl, share = measured("kl", arm), measured("recomputed", arm)
    row = {"arm": arm, "family": way.family, "behind": way.behind, "spelled": way.budget}
    row |= {"questions": int(at.sum()), "chosen_on": measured.mean(kl, chosen_on)}
    for metric in ("extra_nll", "kl", "accuracy"):
        row[metric] = measured.interval(measured(metric, arm), at)
    row["accuracy_full"] = measured.mean(measured("accuracy", FULL), at)
    row["recomputed"] = measured.mean(share - measured("recomputed", "naive"), at)
    row["kl_minus_naive"] = measured.interval(kl - measured("kl", "naive"), at)
    if way.twin:
        row["twin"] = way.twin
        row["kl_minus_twin"] = measured.interval(kl - measured("kl", way.twin), at)
    return row
