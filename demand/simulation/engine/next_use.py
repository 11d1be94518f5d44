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

    Where a run has no other, they are `NEVER_SECONDS`. Runs weigh what they weigh in the graph
    (`half_life_runs`). Nothing is known of a graph without runs and given probabilities.

    Args:
        graph: of the application.
        unit: name of a unit.
        cost: seconds of the units in between, all calls of one side by side.
    """
    if unit not in graph.known:
        return None
    runs = graph.runs or graph.draw_runs(DRAWN)
    weights = graph.run_weights().tolist() if graph.runs else [1.0] * DRAWN
    found: list[float] = []
    weighed: list[float] = []
    for run, weight in zip(runs, weights, strict=True):
        before = len(found)
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
        weighed += [weight] * (len(found) - before)
    return Distribution(found, weighed) if found else None
