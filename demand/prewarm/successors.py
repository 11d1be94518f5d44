"""What a demand graph says of the current unit and of its successors."""

from collections.abc import Mapping
from typing import Protocol, TypeVar

from demand.distribution.distribution import Distribution
from demand.graph.pdgraph import PDGraph
from demand.prewarm.base import Successor
from demand.units import END, CostModel, Unit


class Warmable(Protocol):
    """What a prewarmer has to know of a backend to plan for it."""

    @property
    def warm_seconds(self) -> float:
        """Duration of a warm-up."""

    @property
    def footprint(self) -> float:
        """What one warm instance occupies."""


B = TypeVar("B")


def backend_of(backends: Mapping[str, B], unit: Unit) -> B | None:
    """The backend of `unit`: the one under its name, else the one under its kind, if any."""
    return backends.get(unit.name, backends.get(unit.kind))


def durations_of(graph: PDGraph, unit: str, cost: CostModel) -> Distribution:
    """Seconds from the start of `unit` to the end of its longest call, all calls side by side.

    Args:
        graph: with samples of the unit.
        unit: its name.
        cost: seconds of a call where the unit runs.

    Raises:
        DemandError: a unit that the graph does not know.
    """
    return Distribution([cost.seconds(e, "critical_path") for e in graph.samples(unit)])


def successors_of(
    graph: PDGraph, unit: str, backends: Mapping[str, Warmable]
) -> list[tuple[Unit, Successor]]:
    """The units that may follow `unit` and have a backend.

    All units of a stage follow where it does.

    Raises:
        DemandError: a unit that the graph does not know.
    """
    units = {known.name: known for known in graph.units}
    following: dict[Unit, float] = {}
    for name, probability in graph.branches(unit).items():
        for member in graph.members(units[name]) if name != END else ():
            following[member] = following.get(member, 0.0) + probability
    found = []
    for member, probability in following.items():
        backend = backend_of(backends, member)
        if backend is not None:
            likely = min(probability, 1.0)  # of a sum that was rounded up
            successor = Successor(member.name, likely, backend.warm_seconds, backend.footprint)
            found.append((member, successor))
    return found
