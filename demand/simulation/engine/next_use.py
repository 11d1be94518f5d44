"""How long until the KV of a unit's call is used again, as a demand graph says."""

from demand.distribution.distribution import Distribution
from demand.graph.pdgraph import PDGraph
from demand.units import CostModel

NEVER_SECONDS = 1e9
"""Where no call follows: longer than any run."""

DRAWN = 1000
"""Runs that are drawn from a graph that remembers none."""


def next_use(graph: PDGraph, unit: str, cost: CostModel) -> Distribution | None:
    """Seconds from the end of a call of `unit` to the start of the run's next; None if unknown.

    Where a run has no other, they are `NEVER_SECONDS`.

    Args:
        graph: of the application.
        unit: name of a unit.
        cost: seconds of the units in between, all calls of one side by side.
    """
    runs = graph.runs or graph.draw_runs(DRAWN)
    found = []
    for run in runs:
        since = None
        for execution in run:
            if execution.unit.name == unit:
                if since is not None:
                    found.append(since)
                since = 0.0
            elif since is not None:
                since += cost.seconds(execution, "critical_path")
        if since is not None:
            found.append(NEVER_SECONDS)
    return Distribution(found) if found else None
