"""Does every run of an application come to an end? And the way that one takes."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from demand.units import END, START

U = TypeVar("U")
Ints = NDArray[np.integer[Any]]


class FlowFault(NamedTuple):
    """What keeps runs of an application from ending.

    Attributes:
        unit: from which a run cannot go on; "start" for the beginning.
        problem: in words.
        seen: what was given instead.
    """

    unit: str
    problem: str
    seen: str


def flow_fault(
    entries: Collection[str], successors: Mapping[str, Collection[str]]
) -> FlowFault | None:
    """The first thing that keeps a run from leading from "start", or from any unit, to "end".

    Args:
        entries: names of the units with which runs may begin.
        successors: for each unit, the names of those that may follow it, "end" among them.
    """
    if not successors:
        return FlowFault(START, "an application without stages", "give one or more")
    if not entries or set(entries) - set(successors):
        return FlowFault(START, "expected names of stages", f"seen: {sorted(set(entries))}")
    for name, following in successors.items():
        if not following or set(following) - {*successors, END}:
            seen = f"seen: {sorted(set(following))}"
            return FlowFault(name, "expected names of stages, or end", seen)
    endless = without_end(successors)
    if endless:
        return FlowFault(endless[0], "end cannot be reached", f"from any of: {endless}")
    return None


def without_end(successors: Mapping[str, Collection[str]]) -> list[str]:
    """Names from which no chain of successors leads to "end", in the order given."""
    before = defaultdict(list)
    for name, following in successors.items():
        for successor in following:
            before[successor].append(name)
    ending, found = {END}, [END]
    while found:
        for name in before[found.pop()]:
            if name not in ending:
                ending.add(name)
                found.append(name)
    return [name for name in successors if name not in ending]


def visits(first: U, following: Callable[[U], U], end: U) -> Iterator[U]:
    """The units of one run, from `first` on: each is yielded before `following` is asked for the
    next, until that is `end`.

    Every random run that is drawn by itself goes this way, whatever is drawn at a unit, and whether
    units are known by name or by number; many that are drawn together go by `visits_together`.
    """
    unit = first
    while unit != end:
        yield unit
        unit = following(unit)


def visits_together(
    first: Ints, following: Callable[[Ints, Ints], Ints], end: int
) -> tuple[Ints, Ints]:
    """The units of many runs that take their steps together, by number, as `visits` of one.

    Args:
        first: `[runs]` unit each begins with.
        following: (positions of the runs that go on, the units they are at) to their next units.
        end: of a run.

    Returns:
        `[n]` units of all runs end to end, and `[runs + 1]` where each run starts.
    """
    going, at = np.flatnonzero(first != end), first[first != end]
    runs, units = [], []
    while going.size:
        runs.append(going.astype(np.int32))
        units.append(at)
        at = following(going, at)
        going, at = going[at != end], at[at != end]
    run = np.concatenate(runs or [np.empty(0, np.int32)])
    unit = np.concatenate(units or [first[:0]])[np.argsort(run, kind="stable")]
    return unit, np.cumsum([0, *np.bincount(run, minlength=first.size)])
