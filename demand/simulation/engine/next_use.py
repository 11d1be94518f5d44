"""How long until the KV of a unit's call is used again, as a demand graph says."""

from collections.abc import Sequence
from itertools import pairwise

from demand.dependencies import path_ends
from demand.distribution.distribution import Distribution
from demand.graph.pdgraph import PDGraph
from demand.units import CostModel, Execution, is_sequence

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
        cost: seconds of the units in between, all calls of one side by side, and all units that are
            ready.
    """
    if unit not in {member.name for known in graph.units for member in graph.members(known)}:
        return None
    runs = graph.runs or graph.draw_runs(DRAWN)
    weights = graph.run_weights().tolist() if graph.runs else [1.0] * DRAWN
    found: list[float] = []
    weighed: list[float] = []
    for run, weight in zip(runs, weights, strict=True):
        gaps = _gaps(run, unit, cost)
        found += gaps
        weighed += [weight] * len(gaps)
    return Distribution(found, weighed) if found else None


def _gaps(run: Sequence[Execution], unit: str, cost: CostModel) -> list[float]:
    """Seconds from the end of each execution of `unit` to the start of the next in `run`."""
    if not is_sequence(run):
        return _gaps_side_by_side(run, unit, cost)
    gaps: list[float] = []
    since = None
    for execution in run:
        if execution.unit.name == unit:
            if since is not None:
                gaps.append(since)
            since = 0.0
        elif since is not None:
            since += cost.seconds(execution, "critical_path")
    return gaps if since is None else [*gaps, NEVER_SECONDS]


def _gaps_side_by_side(run: Sequence[Execution], unit: str, cost: CostModel) -> list[float]:
    """The same where each unit begins as soon as those it waits for are over."""
    seconds = [cost.seconds(execution, "critical_path") for execution in run]
    ends = path_ends([execution.after for execution in run], seconds)
    own = [at for at, execution in enumerate(run) if execution.unit.name == unit]
    gaps = [max(ends[after] - seconds[after] - ends[at], 0.0) for at, after in pairwise(own)]
    return [*gaps, NEVER_SECONDS] if own else []
