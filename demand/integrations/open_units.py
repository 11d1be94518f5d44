"""Which kinds the units of open runs are of, so that none is at odds with what will be learned."""

from typing import final

from demand.graph.kinds import check_kind
from demand.units import Unit


@final
class OpenUnits:
    """The units of the runs that are open: of one application, a name stands for one kind.

    A run holds its units until it is over. Then the names are free, unless a graph has observed
    the run or another holds them: what never was learned bars nothing.
    """

    def __init__(self) -> None:
        self._units: dict[str, dict[str, Unit]] = {}  # by application and name
        self._holders: dict[tuple[str, str], set[int]] = {}  # runs, by application and name
        self._held: dict[int, set[tuple[str, str]]] = {}  # the same by run

    def check(self, application: str, unit: Unit) -> None:
        """Raise `DemandError` if an open run holds the name of `unit` for another kind."""
        check_kind(unit, self._units.get(application, {}))

    def hold(self, run: int, application: str, unit: Unit) -> None:
        """Note that `run` has a `unit`, which was checked."""
        key = application, unit.name
        self._units.setdefault(application, {})[unit.name] = unit
        self._holders.setdefault(key, set()).add(run)
        self._held.setdefault(run, set()).add(key)

    def release(self, run: int) -> None:
        """Forget `run`, and the units that no other holds."""
        for key in self._held.pop(run, ()):
            self._holders[key].discard(run)
            if not self._holders[key]:
                application, name = key
                del self._holders[key], self._units[application][name]
                if not self._units[application]:
                    del self._units[application]
