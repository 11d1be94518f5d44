"""What a picture or an export reads of a demand graph."""

from collections.abc import Mapping
from typing import Protocol

from demand.units import CostModel, Execution, Unit


class ReadableGraph(Protocol):
    """A demand graph to those who read it and do not change it; `PDGraph` is one.

    Attributes:
        name: of the application.
        cost: seconds of an execution.
    """

    name: str
    cost: CostModel

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units, in order of first appearance."""

    def samples(self, unit: str) -> tuple[Execution, ...]:
        """The executions of `unit`, by its name."""

    def branches(self, unit: str) -> Mapping[str, float]:
        """Probability of each unit that follows `unit`, or of "end"; "start" has branches too."""
