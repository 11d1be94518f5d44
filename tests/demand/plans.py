"""Runs with units side by side for tests: drawn by hypothesis, and looked at by brute force."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product

from hypothesis import strategies as st

from demand import CostModel, Execution, Unit
from demand.dependencies import After

UNITS = (Unit("think", "llm"), Unit("search", "search"), Unit("math", "tool"))


@st.composite
def executions(draw: st.DrawFn) -> Execution:
    """Of whole numbers, whose sums are exact; of two calls now and then."""
    unit, calls = draw(st.sampled_from(UNITS)), draw(st.integers(1, 2))
    numbers = st.lists(st.integers(1, 9), min_size=calls, max_size=calls)
    if unit.kind == "llm":
        return Execution.of_calls(unit, input_tokens=draw(numbers), output_tokens=draw(numbers))
    return Execution.of_calls(unit, seconds=draw(numbers))


@st.composite
def afters(draw: st.DrawFn, units: int) -> list[After]:
    """What each of some units waits for: anything before it."""
    found: list[After] = []
    for at in range(units):
        before = st.sets(st.integers(0, at - 1)) if at else st.just(set())
        found.append(draw(st.one_of(st.none(), before.map(lambda some: tuple(sorted(some))))))
    return found


@st.composite
def plans(
    draw: st.DrawFn, unit: st.SearchStrategy[Execution] | None = None, most: int = 6
) -> list[Execution]:
    """Runs of up to `most` units that wait for some of those before them."""
    run = draw(st.lists(executions() if unit is None else unit, min_size=1, max_size=most))
    return waiting(run, draw(afters(len(run))))


def waiting(run: Sequence[Execution], waits: Sequence[After]) -> list[Execution]:
    """`run`, each unit of which waits for those told."""
    return [replace(execution, after=after) for execution, after in zip(run, waits, strict=True)]


def told(run: Sequence[Execution]) -> list[Execution]:
    """`run`, a sequence, of which each unit says that it waits for the one before it."""
    return waiting(run, [(at - 1,) if at else () for at in range(len(run))])


def before(run: Sequence[Execution], at: int) -> tuple[int, ...]:
    """Positions that the unit at `at` waits for."""
    after = run[at].after
    return after if after is not None else (at - 1,) if at else ()


def longest_chain(run: Sequence[Execution], cost: CostModel) -> float:
    """Seconds of the longest of all chains of units that wait for each other, one by one."""
    longest = 0.0
    for chosen in product((False, True), repeat=len(run)):
        chain = [at for at, taken in enumerate(chosen) if taken]
        if all(one in before(run, other) for one, other in pairwise(chain)):
            longest = max(longest, sum(cost.seconds(run[at], "critical_path") for at in chain))
    return longest
