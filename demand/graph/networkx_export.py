"""A demand graph as a graph of networkx."""

from typing import TYPE_CHECKING

import numpy as np

from demand.errors import DemandError
from demand.graph.readable import ReadableGraph
from demand.units import END, START

if TYPE_CHECKING:
    from networkx import DiGraph


def to_networkx(graph: ReadableGraph) -> "DiGraph":
    """Export as a `networkx.DiGraph`; loops are edges that lead back.

    Nodes are "start", the units and "end", with `kind` ("start" and "end" for those two),
    `mean_seconds` (of one execution, summed over its parallel calls), `mean_critical_seconds` (of
    its longest call), `mean_parallelism` and `samples`; edges have `probability`. The graph has
    the `name` of the application.

    Raises:
        DemandError: networkx is not installed, or a graph without runs.
    """
    try:
        import networkx
    except ImportError as error:
        raise DemandError(
            'the export needs networkx: pip install "picache[integrations]"'
        ) from error
    export = networkx.DiGraph(name=graph.name)
    export.add_node(START, kind=START)
    for unit in graph.units:
        samples = graph.samples(unit.name)
        export.add_node(
            unit.name,
            kind=unit.kind,
            mean_seconds=float(np.mean([graph.cost.seconds(e) for e in samples])),
            mean_critical_seconds=float(
                np.mean([graph.cost.seconds(e, "critical_path") for e in samples])
            ),
            mean_parallelism=float(np.mean([e.parallelism for e in samples])),
            samples=len(samples),
        )
    export.add_node(END, kind=END)
    for name in (START, *(unit.name for unit in graph.units)):
        for successor, probability in graph.branches(name).items():
            export.add_edge(name, successor, probability=probability)
    return export
