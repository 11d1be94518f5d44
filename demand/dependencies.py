"""Which units of a run wait for which: what may be said, the longest path, and stages."""

from collections.abc import Iterable, Sequence

from demand.arguments import whole_number
from demand.errors import DemandError

After = tuple[int, ...] | None
"""Positions in its run of the units that a unit waits for; `None`: of the one before it, if any."""


def read_after(unit: str, after: object) -> tuple[int, ...]:
    """`after` as positions in order, each once.

    Raises:
        DemandError: what is no list of whole numbers of at least 0.
    """
    if isinstance(after, str) or not isinstance(after, Iterable):
        raise DemandError(
            f"after of unit {unit!r} is {after!r:.200}; expected the positions in its run of the "
            "units that it waits for, such as (0, 2), () for none, or None for the one before it"
        )
    what = f"after of unit {unit!r}"
    return tuple(sorted({whole_number(what, position, least=0) for position in after}))


def in_sequence(afters: Iterable[After]) -> bool:
    """Whether each unit waits for the one before it and for no other, told or not."""
    return all(
        after is None or after == ((at - 1,) if at else ()) for at, after in enumerate(afters)
    )


def check_after(name: str, afters: Sequence[After]) -> None:
    """Raise `DemandError` for a unit that waits for itself, for a later one, or for none there is.

    A run of which this is true has no circle.

    Args:
        name: of the run, for the error.
        afters: what each of its units says.
    """
    for at, after in enumerate(afters):
        check_unit_after(name, at, after, len(afters))


def check_unit_after(name: str, at: int, after: After, units: int) -> None:
    """`check_after` of the unit at position `at` of a run of so many units."""
    for before in after or ():
        if before >= at:
            problem = "there is none" if before >= units else "not before it"
            expected = f"positions from 0 to {at - 1}" if at else "() or None for the first unit"
            raise DemandError(
                f"unit {at} of {name} waits for unit {before}, "
                f"{'which is itself' if before == at else problem}; expected {expected}: put the "
                "units in an order in which each comes after those it waits for, which there is "
                "unless they wait for each other in a circle"
            )


def parents(afters: Sequence[After]) -> list[tuple[int, ...]]:
    """Positions that each unit waits for, those left out included."""
    return [
        ((at - 1,) if at else ()) if after is None else after for at, after in enumerate(afters)
    ]


def path_ends(afters: Sequence[After], seconds: Sequence[float]) -> list[float]:
    """When each unit is over if each begins as soon as those it waits for are.

    Args:
        afters: what each unit says.
        seconds: that each takes.
    """
    ends: list[float] = []
    for before, each in zip(parents(afters), seconds, strict=True):
        ends.append(max((ends[at] for at in before), default=0.0) + each)
    return ends


def longest_path(afters: Sequence[After], seconds: Sequence[float]) -> float:
    """Seconds until all units are over, as `path_ends`."""
    return max(path_ends(afters, seconds), default=0.0)


def stage_numbers(afters: Sequence[After]) -> list[int]:
    """The stage of each unit: 0 if it waits for none, else one more than the last it waits for."""
    stages: list[int] = []
    for before in parents(afters):
        stages.append(1 + max((stages[at] for at in before), default=-1))
    return stages
