"""Each arm's context, accuracy and performance beside full attention's, with 95 % intervals.

Bounds are what full attention takes at some context, so that there is one scale for any machine;
that of the context with most requests is the one where accuracy and speed are told.
"""

from collections import defaultdict
from typing import Any

import numpy as np
from cap.arms import FULL
from cap.definitions import agreement, cost, extra_loss, longest_context, tokens_a_second
from numpy.typing import NDArray
from scipy import stats

Interval = list[float]
"""Estimate, lower and upper end."""
Rows = dict[int, dict[int, dict[str, Any]]]
"""The rows of an arm by context and number of the request."""

SECONDS = ("first_token_seconds", "between_tokens_seconds")
"""What is the median where a request was served in the same way several times."""
ANSWER = 64
"""Tokens of the answer whose tokens a second are told."""
SLOWEST = 1.5
"""Times full attention's seconds between tokens that a reader takes."""
SAME = 0.05
"""Share of C and P, and nats a token, within which an arm counts as no different."""
DRAWS = 400
OFFERS = {
    "both": (1, 1),
    "time": (2, 1),
    "memory": (1, 2),
}
"""What binds: times the context at which full attention just meets the bound on memory, on time."""


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """What is told of each arm, and what the principle says of it.

    Args:
        record: as `measure.py` made it: configuration, environment, seconds, arms, rows.
    """
    served: dict[tuple[str, int, int], list[dict[str, Any]]] = defaultdict(list)
    refused: dict[str, str] = {}
    for row in record["rows"]:
        if "refused" in row:
            refused.setdefault(row["arm"], row["refused"])
        else:
            served[row["arm"], row["context"], row["number"]].append(row)
    by_arm: dict[str, Rows] = defaultdict(lambda: defaultdict(dict))
    for (arm, context, number), rows in served.items():
        by_arm[arm][context][number] = rows[0] | {
            name: float(np.median([row[name] for row in rows])) for name in SECONDS
        }
    full = by_arm[FULL]
    if not full:
        raise SystemExit("no request is served by full attention yet: give more --seconds")
    reference = max(full, key=lambda context: (len(full[context]), -context))
    judged = Judge(full, reference, record["configuration"]["seed"])
    scored = not record["configuration"]["random_weights"]  # they have no accuracy to tell of
    rows = [
        {name: arm[name] for name in ("label", "kind", "method", "budget")}
        | judged.of(by_arm[arm["label"]], scored)
        for arm in record["arms"]
        if reference in by_arm.get(arm["label"], {})
    ]
    for row in rows:
        row["dominated"] = scored and any(dominates(other, row) for other in rows)
    return {
        "configuration": record["configuration"]
        | {"reference_context": reference, "answer_told": ANSWER, "same": SAME},
        "environment": record["environment"],
        "seconds": record["seconds"],
        "bounds": judged.bounds,
        "arms": record["arms"],
        "rows": _without_infinities(rows),
        "refused": [{"arm": arm, "why": why} for arm, why in refused.items()],
    }


class Judge:
    """Full attention's rows, against which arms are held.

    Args:
        full: its rows.
        reference: the context where accuracy and speed are told.
        seed: of the intervals of C.
    """

    def __init__(self, full: Rows, reference: int, seed: int) -> None:
        self._full, self._reference, self._seed = full, reference, seed
        memory, seconds = (self._curve(full, name) for name in ("bytes", "first_token_seconds"))
        at = full[reference].values()
        between = float(np.median([row["between_tokens_seconds"] for row in at]))
        self._first, self._between = cost(*seconds, reference), SLOWEST * between
        self.bounds = {
            name: {
                "memory_bytes": times * cost(*memory, reference),
                "first_token_seconds": cost(*seconds, longer * reference),
            }
            for name, (times, longer) in OFFERS.items()
        } | {"between_tokens_seconds": self._between}

    def of(self, rows: Rows, scored: bool) -> dict[str, Any]:
        """What is told of an arm with these rows; `scored` where it has an accuracy."""
        at = rows[self._reference]
        pairs = [(at[number], self._full[self._reference][number]) for number in sorted(at)
                 if number in self._full[self._reference]]  # fmt: skip
        rates = [(self._rate(own), self._rate(full)) for own, full in pairs]
        found: dict[str, Any] = {
            "requests": {str(context): len(there) for context, there in sorted(rows.items())},
            "context": self._contexts(rows),
            "tokens_a_second": float(np.mean([own for own, _ in rates])),
            "speed": ratio(rates),
            **{
                name: ratio([(own[key], full[key]) for own, full in pairs])
                for name, key in (
                    ("first_token", "first_token_seconds"),
                    ("between_tokens", "between_tokens_seconds"),
                )
            },
            **{
                f"{name}_seconds": float(np.median([own[f"{name}_seconds"] for own, _ in pairs]))
                for name in ("first_token", "between_tokens")
            },
            **{
                name: float(np.mean([own[name] for own, _ in pairs]))
                for name in ("resting_bytes", "working_bytes")
            },
        }
        if "allocated_bytes" in pairs[0][0]:
            found["allocated_bytes"] = float(np.mean([own["allocated_bytes"] for own, _ in pairs]))
        found |= dict.fromkeys(("extra_nll", "agreement"))
        if scored:
            found |= {
                "extra_nll": mean([extra_loss(own["nats"], full["nats"]) for own, full in pairs]),
                "agreement": mean(
                    [agreement(own["likeliest"], full["likeliest"]) for own, full in pairs]
                ),
            }
        found["verdicts"] = {name: self._verdict(found, name) for name in OFFERS}
        return found

    def _rate(self, row: dict[str, Any]) -> float:
        """Tokens a second of the answer that is told, both bounds kept."""
        first, between = row["first_token_seconds"], row["between_tokens_seconds"]
        return tokens_a_second(first, between, ANSWER, self._first, self._between)

    def _curve(self, rows: Rows, name: str) -> tuple[list[float], list[float]]:
        """Contexts, and the median of the requests there."""
        contexts = sorted(rows)
        values = [
            float(np.median([_value(one, name) for one in rows[c].values()])) for c in contexts
        ]
        return [float(context) for context in contexts], values

    def _drawn(self, rows: Rows, name: str) -> tuple[list[float], NDArray[np.float64]]:
        """The same of requests drawn again: medians `[draws, contexts]`; all arms draw alike."""
        random = np.random.default_rng(self._seed)
        contexts, medians = sorted(rows), []
        for context in contexts:
            values = np.array([_value(rows[context][n], name) for n in sorted(rows[context])])
            picked = random.integers(0, len(values), (DRAWS, len(values)))
            medians.append(np.median(values[picked], axis=1))
        return [float(context) for context in contexts], np.stack(medians, 1)

    def _contexts(self, rows: Rows) -> dict[str, Interval]:
        """C within each offer, with an interval from requests drawn again, full attention's too."""
        names = ("bytes", "first_token_seconds")
        memory, seconds, held, first = (
            self._drawn(of, name) for of in (rows, self._full) for name in names
        )
        once = [self._curve(of, name) for of in (rows, self._full) for name in names]
        found = {}
        for offer, (times, longer) in OFFERS.items():

            def longest(
                own: Any, late: Any, full: Any, slow: Any, at: Any = (times, longer)
            ) -> float:
                return longest_context(
                    memory[0], own, late,
                    at[0] * cost(held[0], full, self._reference),
                    cost(first[0], slow, at[1] * self._reference),
                )  # fmt: skip

            estimate = longest(*(values for _, values in once))
            draws = zip(memory[1], seconds[1], held[1], first[1], strict=True)
            ends = np.quantile([longest(*drawn) for drawn in draws], [0.025, 0.975])
            found[offer] = [estimate, *(float(end) for end in ends)]
        return found

    def _verdict(self, found: dict[str, Any], offer: str) -> dict[str, str]:
        """Of C, A and P: improved, paid, same, or open where the interval does not say."""
        verdict = {
            "C": verdict_of([end / self._reference - 1 for end in found["context"][offer]]),
            "P": verdict_of([end - 1 for end in found["speed"]]),
        }
        if found["extra_nll"] is not None:
            verdict["A"] = verdict_of([-end for end in found["extra_nll"]])
        return verdict


def _without_infinities(of: Any) -> Any:
    """The same with None for an end that there is not, which JSON has no number for."""
    if isinstance(of, dict):
        return {name: _without_infinities(one) for name, one in of.items()}
    if isinstance(of, list):
        return [_without_infinities(one) for one in of]
    return None if isinstance(of, float) and not np.isfinite(of) else of


def _value(row: dict[str, Any], name: str) -> float:
    if name == "bytes":  # of all that is in memory for the request
        return float(row["resting_bytes"] + row["working_bytes"])
    return float(row[name])


def verdict_of(gain: Interval) -> str:
    """What an interval says of a gain: estimate and two ends, in any order, 0 for no gain."""
    low, high = min(gain[1:]), max(gain[1:])
    if low >= -SAME and high <= SAME:
        return "same"
    if low > 0:
        return "improved"
    return "paid" if high < 0 else "open"


def mean(values: list[float]) -> Interval:
    """Mean of a value a request, and its 95 % interval by Student's t; without ends for one."""
    middle = float(np.mean(values))
    if len(values) < 2:
        return [middle, -np.inf, np.inf]
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return [middle, middle - half, middle + half]


def ratio(pairs: list[tuple[float, float]]) -> Interval:
    """Geometric mean of the first over the second, and its interval; 0 where a first is 0."""
    if any(own <= 0 for own, _ in pairs):
        return [0.0, 0.0, max(own / full for own, full in pairs)]
    return [float(np.exp(end)) for end in mean([np.log(own / full) for own, full in pairs])]


def three(row: dict[str, Any]) -> NDArray[np.float64]:
    """C, A and P of a row as estimated, more of each being better."""
    return np.array([row["context"]["both"][0], -row["extra_nll"][0], row["speed"][0]])


def dominates(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether an arm is at least as good in all three as estimated, and better in one."""
    gain = three(one) - three(other)
    return bool((gain >= 0).all() and (gain > 0).any())
