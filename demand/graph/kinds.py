"""A unit's name stands for one kind."""

from collections.abc import Mapping

from demand.errors import DemandError
from demand.units import Unit


def check_kind(unit: Unit, known: Mapping[str, Unit]) -> None:
    """Raise `DemandError` if `unit` is of another kind than the unit of its name in `known`."""
    before = known.get(unit.name, unit)
    if before != unit:
        raise DemandError(
            f"unit {unit.name!r} is of kind {unit.kind!r} here and of kind {before.kind!r} before; "
            "give the two different names"
        )
