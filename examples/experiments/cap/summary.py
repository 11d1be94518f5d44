"""Each arm's context, accuracy and performance beside full attention's, with 95 % intervals.

Bounds are what full attention takes at some context, so that there is one scale for any machine;
that of the context with most requests is the one where accuracy and speed are told. Seconds of an
arm are those relative to full attention's nearest in time, on the same request in the same process,
times what full attention takes on these requests: a machine that drifts makes neither faster.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from cap.arms import FULL
from cap.definitions import agreement, cost, extra_loss, longest_context, tokens_a_second
from numpy.typing import NDArray
from scipy import stats

Interval = list[float]
"""Estimate, lower and upper end; infinite ends where there are none."""
Pairs = dict[int, dict[int, tuple[dict[str, Any], dict[str, Any]]]]
"""By context and number of the request: a row of the arm, and of full attention near it in time."""

SECONDS = ("first_token_seconds", "between_tokens_seconds")
ANSWER = 64
"""Tokens of the answer whose tokens a second are told."""
SLOWEST = 1.5
"""Times full attention's seconds between tokens that a reader takes."""
SAME = 0.05
"""Share of C and P, and nats a token, within which an arm counts as no different."""
LEVEL = 0.05
"""Of all tests together, by Holm, at which the principle is called refuted for an arm."""
DRAWS = 400


class Offer(NamedTuple):
    """What a user allows, in terms of what full attention takes at the reference context or beyond.

    Attributes:
        memory: times its bytes at the reference.
        reach: the bound on the first token is its seconds at so many times the reference.
    """

    memory: int
    reach: int


OFFERS = {"both": Offer(1, 1), "time": Offer(2, 1), "memory": Offer(1, 2)}
"""By what binds."""


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """What is told of each arm, and what the principle says of it.

    Args:
        record: as `measure.py` made it: configuration, environment, seconds, arms, rows.
    """
    refused: dict[str, str] = {}
    measured: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    served = []
    for row in record["rows"]:
        if "refused" in row:
            refused.setdefault(row["arm"], row["refused"])
        elif row["arm"] == FULL:
            measured[row["context"], row["number"]].append(row)
        else:
            served.append(row)
    if not measured:
        raise SystemExit("no request is served by full attention yet: give more --seconds")
    by_arm: dict[str, Pairs] = defaultdict(lambda: defaultdict(dict))
    for (context, number), rows in measured.items():
        typical = rows[0] | {n: float(np.median([row[n] for row in rows])) for n in SECONDS}
        by_arm[FULL][context][number] = typical, typical
    for row in served:
        beside = nearest(row, measured[row["context"], row["number"]])
        by_arm[row["arm"]][row["context"]][row["number"]] = row, beside
    full = by_arm[FULL]
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
        row["dominated"] = any(dominates(other, row) for other in tested(rows, reference))
    if scored:
        _adjust([row for row in rows if row["kind"] != FULL], reference)
    return {
        "configuration": record["configuration"]
        | {"reference_context": reference, "answer_told": ANSWER, "same": SAME},
        "environment": record["environment"],
        "seconds": record["seconds"],
        "full_measurements": sum(map(len, measured.values())),
        "bounds": judged.bounds,
        "arms": record["arms"],
        "rows": _without_infinities(rows),
        "refused": [{"arm": arm, "why": why} for arm, why in refused.items()],
    }


def nearest(row: dict[str, Any], full: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Full attention's row of the same piece of measuring that is nearest in time.

    Raises:
        ValueError: there is none, so that the row cannot be held against anything.
    """
    found = [one for one in full if one["piece"] == row["piece"]]
    if not found:
        raise ValueError(
            f"{row['arm']} at {row['context']} tokens, request {row['number']}, has no full "
            f"attention of its piece {row['piece']!r} beside it: measure it again"
        )
    return min(found, key=lambda one: abs(one["at"] - row["at"]))


class Judge:
    """Full attention's rows, against which arms are held.

    Args:
        full: its rows, each beside itself.
        reference: the context where accuracy and speed are told.
        seed: of the intervals of C.
    """

    def __init__(self, full: Pairs, reference: int, seed: int) -> None:
        self._full, self._reference, self._seed = full, reference, seed
        first, self._between = (
            float(np.mean([row[name] for row, _ in full[reference].values()])) for name in SECONDS
        )
        self._first = first
        self.bounds = {
            name: dict(zip(("memory_bytes", "first_token_seconds"), bounds, strict=True))
            for name, bounds in self._bounds(full).items()
        } | {"between_tokens_seconds": SLOWEST * self._between}

    def _of_full(self, pairs: Pairs, name: str) -> dict[int, float]:
        """Full attention's mean by context: over the arm's requests, over all where it has none."""
        found = {}
        for context, every in self._full.items():
            numbers = pairs.get(context, every)
            found[context] = float(np.mean([_value(every[number][0], name) for number in numbers]))
        return found

    def _bounds(self, pairs: Pairs) -> dict[str, tuple[float, float]]:
        """Bytes and seconds to the first token of each offer, by the requests of these pairs."""
        held, late = (self._of_full(pairs, name) for name in ("bytes", "first_token_seconds"))
        memory = held[self._reference]
        return {
            name: (
                offer.memory * memory,
                cost([*late], [*late.values()], offer.reach * self._reference),
            )
            for name, offer in OFFERS.items()
        }

    def of(self, pairs: Pairs, scored: bool) -> dict[str, Any]:
        """What is told of an arm with these rows; `scored` where it has an accuracy."""
        at = [pairs[self._reference][number] for number in sorted(pairs[self._reference])]
        rates = {name: [self._rate(*pair, name) for pair in at] for name in OFFERS}
        own = ANSWER / (self._first + (ANSWER - 1) * self._between)  # full meets every bound
        found: dict[str, Any] = {
            "requests": {str(context): len(there) for context, there in sorted(pairs.items())},
            "context": self._contexts(pairs),
            "tokens_a_second": {name: float(np.mean(each)) for name, each in rates.items()},
            "speed": {name: mean([rate / own for rate in each]) for name, each in rates.items()},
            **{
                name: mean([row[f"{name}_seconds"] / full[f"{name}_seconds"] for row, full in at])
                for name in ("first_token", "between_tokens")
            },
            **{
                name: float(np.mean([row[name] for row, _ in at]))
                for name in ("resting_bytes", "working_bytes", "preparing_bytes")
            },
        }
        found |= dict.fromkeys(("extra_nll", "agreement"))
        if scored:
            found |= {
                "extra_nll": mean([extra_loss(row["nats"], full["nats"]) for row, full in at]),
                "agreement": mean(
                    [agreement(row["likeliest"], full["likeliest"]) for row, full in at]
                ),
            }
            found["p"] = {
                name: max(
                    self._chance_of_context(pairs, name),
                    chance([1 - rate / own for rate in rates[name]]),
                    chance([extra_loss(row["nats"], full["nats"]) for row, full in at]),
                )
                for name in OFFERS
            }
        found["verdicts"] = {name: self._verdict(found, name) for name in OFFERS}
        return found

    def _rate(self, row: dict[str, Any], full: dict[str, Any], offer: str) -> float:
        """Tokens a second of the answer that is told, both bounds of an offer kept."""
        first, between = (
            row[name] / full[name] * typical
            for name, typical in zip(SECONDS, (self._first, self._between), strict=True)
        )
        bounds = self.bounds[offer]["first_token_seconds"], self.bounds["between_tokens_seconds"]
        return tokens_a_second(first, between, ANSWER, *bounds)

    def _relative(self, pairs: Pairs, name: str, context: int) -> list[float]:
        """An arm's bytes or seconds over those of full attention beside it, a request after one."""
        there = pairs[context]
        return [_value(there[n][0], name) / _value(there[n][1], name) for n in sorted(there)]

    def _contexts(self, pairs: Pairs) -> dict[str, Interval]:
        """C within each offer. Its interval is of curves drawn around the measured one.

        At each context the mean of an arm's cost over full attention's moves by its standard error
        times Student's t, which is as wide as few requests ask for; one request has no interval.
        Where a curve stays within the bounds up to the arm's own longest context there is no upper
        end, since what is beyond it was not measured.
        """
        contexts = sorted(pairs)
        random = np.random.default_rng(self._seed)
        drawn, estimates = [], []
        for name in ("bytes", "first_token_seconds"):
            of_full = self._of_full(pairs, name)
            relative = [self._relative(pairs, name, context) for context in contexts]
            scale = np.array([of_full[context] for context in contexts])
            estimates.append(scale * np.array([np.mean(each) for each in relative]))
            drawn.append(scale * np.stack([_around(each, random) for each in relative], 1))
        told = min(map(len, pairs.values())) > 1
        found = {}
        for name, bounds in self._bounds(pairs).items():
            estimate = longest_context(contexts, *estimates, *bounds)
            low, high = -np.inf, np.inf
            if told:
                each = [
                    longest_context(contexts, *one, *bounds) for one in zip(*drawn, strict=True)
                ]
                low, high = (float(end) for end in np.quantile(each, [0.025, 0.975]))
                high = np.inf if high >= contexts[-1] else high
            found[name] = [estimate, low, high]
        return found

    def _chance_of_context(self, pairs: Pairs, name: str) -> float:
        """Of what was seen or more where C is not above the reference: the costs there decide."""
        if max(pairs) <= self._reference:
            return 1.0
        of_full = [
            self._of_full(pairs, what)[self._reference] for what in ("bytes", "first_token_seconds")
        ]
        return max(
            chance([one - bound / full for one in self._relative(pairs, what, self._reference)])
            for what, bound, full in zip(
                ("bytes", "first_token_seconds"), self._bounds(pairs)[name], of_full, strict=True
            )
        )

    def _verdict(self, found: dict[str, Any], offer: str) -> dict[str, str]:
        """Of C, A and P: improved, paid, same, or open where the interval does not say."""
        verdict = {
            "C": verdict_of([end / self._reference - 1 for end in found["context"][offer]]),
            "P": verdict_of([end - 1 for end in found["speed"][offer]]),
        }
        if found["extra_nll"] is not None:
            verdict["A"] = verdict_of([-end for end in found["extra_nll"]])
        return verdict


def _around(values: list[float], random: np.random.Generator) -> NDArray[np.float64]:
    """Draws of the mean of these, none below 0; the mean itself where there is one value alone."""
    middle = float(np.mean(values))
    if len(values) < 2:
        return np.full(DRAWS, middle)
    t = random.standard_t(len(values) - 1, DRAWS)
    return np.maximum(middle + stats.sem(values) * t, 0.0)


def chance(values: list[float]) -> float:
    """Of a mean this far below 0 or farther where it is not below 0; one-sided Student's t.

    1 for a single value, which says nothing. Values that are all the same leave no doubt.
    """
    if len(values) < 2:
        return 1.0
    middle, error = float(np.mean(values)), float(stats.sem(values))
    if error < 1e-12:
        return 0.0 if middle < -1e-9 else 1.0
    return float(stats.t.cdf(middle / error, len(values) - 1))


def holm(chances: Sequence[float]) -> list[float]:
    """Chances of several tests, adjusted so that any false one among them is as rare as stated.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    adjusted, highest = [1.0] * len(chances), 0.0
    for rank, place in enumerate(np.argsort(chances)):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[place]))
        adjusted[place] = highest
    return adjusted


def tested(rows: Sequence[dict[str, Any]], reference: int) -> list[dict[str, Any]]:
    """The rows with an accuracy and with more than one request, without which there is no test."""
    return [r for r in rows if r["extra_nll"] is not None and r["requests"][str(reference)] > 1]


def _adjust(rows: list[dict[str, Any]], reference: int) -> None:
    """Write to each row its chances among those of all arms and offers that are tested."""
    for row in rows:
        row["p_of_all"] = dict.fromkeys(OFFERS, 1.0)
    every = [(row, name) for row in tested(rows, reference) for name in OFFERS]
    for (row, name), adjusted in zip(every, holm([r["p"][n] for r, n in every]), strict=True):
        row["p_of_all"][name] = adjusted


def smallest_seen(rows: Sequence[dict[str, Any]], reference: int) -> dict[str, float]:
    """The gain that the arms' intervals would have shown at the first step of Holm's procedure.

    Of A in nats a token and of P as a share of full attention's (both bounds): the median of the
    arms' standard errors times Student's t at the level over the number of tests. Empty where no
    arm is tested.

    Args:
        rows: of the arms, as `summary` told them.
        reference: the context where A and P are told.
    """
    found: dict[str, list[float]] = {"A": [], "P": []}
    counted = tested(rows, reference)
    for row in counted:
        degrees = row["requests"][str(reference)] - 1
        step = stats.t.ppf(1 - LEVEL / (len(counted) * len(OFFERS)), degrees)
        for letter, (_, low, high) in (("A", row["extra_nll"]), ("P", row["speed"]["both"])):
            found[letter].append((high - low) / 2 / stats.t.ppf(0.975, degrees) * step)
    return {letter: float(np.median(each)) for letter, each in found.items() if each}


def _without_infinities(of: Any) -> Any:
    """The same with None for an end that there is not, which JSON has no number for."""
    if isinstance(of, dict):
        return {name: _without_infinities(one) for name, one in of.items()}
    if isinstance(of, list):
        return [_without_infinities(one) for one in of]
    return None if isinstance(of, float) and not np.isfinite(of) else of


def _value(row: dict[str, Any], name: str) -> float:
    if name == "bytes":  # of all that is in memory for the request, before it comes and after
        served = row["resting_bytes"] + row["working_bytes"]
        return float(max(row["preparing_bytes"], served))
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


def three(row: dict[str, Any]) -> NDArray[np.float64]:
    """C, A and P of a row as estimated, more of each being better."""
    return np.array([row["context"]["both"][0], -row["extra_nll"][0], row["speed"]["both"][0]])


def dominates(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether an arm is at least as good in all three as estimated, and better in one."""
    gain = three(one) - three(other)
    return bool((gain >= 0).all() and (gain > 0).any())
