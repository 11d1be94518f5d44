"""What each of three parts contributes to a time, and whether the parts add up.

Times of the eight combinations of link, retention and order are compared as logarithms: a part that
halves the time takes log 2 off, whatever else is on, and parts that add up multiply as factors.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import product

PARTS = ("link", "retention", "order")
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of Student's t at 97.5 % for 1 to 9 degrees of freedom."""

Combination = tuple[bool, bool, bool]
"""Whether link, retention and order are on."""


def effects(times: Mapping[Combination, float]) -> dict[str, float]:
    """Contrasts of the eight log times of one repeat.

    Args:
        times: positive seconds of every combination.

    Returns:
        By part, the mean change of the log time that it makes over the four combinations of the
        others; by pair ("link x order") by how much more it makes where the other is on, the mean
        over the third; "sum" the log time of all three over none if the three changes against
        none added up; "measured" what it is; "left over" measured less sum.
    """
    logs = {each: math.log(times[each]) for each in product((False, True), repeat=3)}
    found: dict[str, float] = {}
    for place, part in enumerate(PARTS):
        found[part] = _contrast(logs, (place,))
    for one in range(3):
        for other in range(one + 1, 3):
            found[f"{PARTS[one]} x {PARTS[other]}"] = 2.0 * _contrast(logs, (one, other))
    none, whole = logs[False, False, False], logs[True, True, True]
    alone = [logs[tuple(place == part for place in range(3))] - none for part in range(3)]
    found |= {f"{part} alone": change for part, change in zip(PARTS, alone, strict=True)}
    found["sum"], found["measured"] = sum(alone), whole - none
    found["left over"] = found["measured"] - found["sum"]
    return found


def _contrast(logs: Mapping[Combination, float], places: tuple[int, ...]) -> float:
    """Mean where an even number of `places` is off, less the mean of the rest."""
    sides: tuple[list[float], list[float]] = ([], [])
    for combination, log in logs.items():
        off = sum(not combination[place] for place in places)
        sides[off % 2].append(log)
    return statistics.fmean(sides[0]) - statistics.fmean(sides[1])


def over_repeats(values: Sequence[float]) -> dict[str, float | list[float] | None]:
    """The mean of log changes over repeats as a factor, and its 95 % interval by Student's t.

    None for an interval where there is one repeat, or more than ten.
    """
    mean = statistics.fmean(values)
    interval = None
    if 2 <= len(values) <= len(T_975) + 1:
        half = T_975[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
        interval = [math.exp(mean - half), math.exp(mean + half)]
    return {"factor": math.exp(mean), "interval": interval}


def share_interval(right: int, of: int) -> list[float]:
    """The 95 % interval of a share by Wilson's score (1927)."""
    z, share = 1.959964, right / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return [max(0.0, middle - half), min(1.0, middle + half)]
