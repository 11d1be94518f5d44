"""Each paper's claims beside what was measured; a verdict follows from the numbers by a rule.

"Confirmed" and "refuted" want the whole 95 % interval on one side of the line that the claim draws;
where it lies on both sides nothing is decided.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from picache import Comparison
from picache.comparison import Interval


class Claim(NamedTuple):
    """A row of the table."""

    paper: str
    claim: str
    measured: str
    verdict: str


def table(record: dict) -> str:
    """Of a record of `quickstart.py`, as Markdown."""
    rows = [*_of_linking(record), *_of_retention(record), *_of_scheduling(record)]
    lines = ["| paper | claim | measured | verdict |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _comparison(record: dict, name: str) -> Comparison:
    """The numbers of a record, question by question or text by text."""
    values = {
        arm: {metric: np.array(numbers, dtype=float) for metric, numbers in found.items()}
        for arm, found in record["values"][name].items()
    }
    return Comparison(values, name, frozenset({"accuracy"}))


def _at_most(loss: Interval, line: float) -> str:
    """What is to be said of the claim that a loss is at most `line`."""
    if loss.high <= line:
        return "confirmed"
    return "refuted" if loss.low > line else "not decided"


def _nats(loss: Interval) -> str:
    return f"{loss.estimate:+.3f} nats a token [{loss.low:+.3f}, {loss.high:+.3f}]"


def _of_linking(record: dict) -> Iterator[Claim]:
    result = _comparison(record, "linking")
    layers = record["attention_on_first_tokens"]
    full, naive, first = (float(np.mean(layers[a])) for a in ("full", "naive", "LegoLink-1"))
    gone = naive > 10 * full and first < 0.1 * naive
    yield Claim(
        "EPIC",
        "chunks compiled alone bring attention sinks, which recomputing first tokens ends",
        f"attention on first tokens: full {full:.1%}, naive {naive:.1%}, LegoLink-1 {first:.1%}",
        "confirmed" if gone else "refuted",
    )
    for arm in ("LegoLink-4", "LegoLink-16", "LegoLink-4, 4 dummies"):
        loss = result.loss(arm, "accuracy")
        low, high = 100 * loss.low, 100 * loss.high
        measured = f"{100 * loss.estimate:.0f} points [{low:.0f}, {high:.0f}]"
        said = f"{arm} loses at most 7 points of accuracy"
        yield Claim("EPIC", said, measured, _at_most(loss, 0.07))
    for arm, chance in (("LegoLink-4", "random-4"), ("LegoLink-1", "naive")):
        apart = result.loss(arm, "extra_nll", of=chance)
        said = f"{arm} is better than {chance}"
        yield Claim("EPIC", said, _nats(apart), _at_most(apart, 0.0))
    times = {row["arm"]: row["time_of_full"] for row in record["linking"]}
    faster = times["CacheBlend 15 %"] / times["LegoLink-4"]
    yield Claim(
        "EPIC",
        "up to 8 times less time to the first token than CacheBlend",
        f"{faster:.1f} times less, {1 / times['LegoLink-4']:.1f} times less than full prefill",
        "confirmed" if faster >= 8 else "partly" if faster > 1 else "refuted",
    )


def _of_retention(record: dict) -> Iterator[Claim]:
    result = _comparison(record, "retention")
    for arm in ("Quest", "RaaS"):
        loss = result.loss(arm, "extra_nll")
        said = f"{arm} is as accurate as dense attention, to 0.05 nats a token"
        yield Claim(arm, said, _nats(loss), _at_most(loss, 0.05))
    for other in ("random", "StreamingLLM", "H2O"):
        apart = result.loss("RaaS", "extra_nll", of=other)
        yield Claim("RaaS", f"RaaS is better than {other}", _nats(apart), _at_most(apart, 0.0))
    held = {row["arm"]: row["kept_bytes"] for row in record["retention"]}
    raas, quest = held["RaaS"] / held["dense"], held["Quest"] / held["dense"]
    yield Claim(
        "RaaS",
        "its memory is that of the budget, where Quest's is that of the text",
        f"RaaS {raas:.2f}, Quest {quest:.2f} of the bytes of dense attention",
        "confirmed" if raas < 1 <= quest else "refuted",
    )


def _of_scheduling(record: dict) -> Iterator[Claim]:
    rows = {(row["mix"], row["arm"]): row for row in record["scheduling"]}
    for metric, name, line in (("mean", "mean", 0.3), ("p95", "P95", 0.2)):
        ratio = rows["hermes", "Gittins"][f"{metric}_to_fcfs"]
        yield Claim(
            "Hermes",
            f"{name} completion time down by over {1 - line:.0%}, simulated, on the paper's mix",
            f"down by {1 - ratio:.0%}",
            "confirmed" if ratio < line else "refuted",
        )
    gains = [
        rows[mix, "Gittins"]["mean_seconds"] / rows[mix, "ClassMean"]["mean_seconds"]
        for mix in ("hermes", "bimodal")
    ]
    useful = [gain < 0.97 for gain in gains]
    yield Claim(
        "Hermes",
        "the gain is the Gittins index's, not that of knowing each application's mean",
        f"mean, Gittins to ClassMean: {gains[0]:.2f} on its mix, {gains[1]:.2f} on bimodal demands",
        "confirmed" if all(useful) else "partly" if any(useful) else "refuted",
    )
