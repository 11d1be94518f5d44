"""The file of a saved estimator: its settings and its graphs, as versioned JSON."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from demand.graph.file_format import (
    GraphRecord,
    check_format,
    graph_document,
    graph_record,
    read_document,
    undamaged,
    write_document,
)
from demand.units import CostModel, ParallelCalls

FORMAT = "demand.DemandEstimator"
VERSION = 1
WRITER = "DemandEstimator.save"


@dataclass(frozen=True)
class EstimatorRecord:
    """What is saved of a `DemandEstimator`: all but its refinement, which is code."""

    graphs: Mapping[str, GraphRecord]
    parallel_calls: ParallelCalls
    cost: CostModel
    lag: float


def write_estimator(path: str | os.PathLike[str], record: EstimatorRecord) -> None:
    """Write `record` to `path`, in one step as far as readers can see."""
    graphs = {name: graph_document(graph) for name, graph in record.graphs.items()}
    document = {
        "format": FORMAT,
        "version": VERSION,
        "parallel_calls": record.parallel_calls,
        "cost": asdict(record.cost),
        "lag": record.lag,
        "graphs": graphs,
    }
    write_document(path, document)


def read_estimator(path: str | os.PathLike[str]) -> EstimatorRecord:
    """Read what `write_estimator` wrote.

    Raises:
        DemandError: the file is not such a document, with what is wrong.
        FileNotFoundError: no file at `path`.
    """
    found = check_format(path, read_document(path, WRITER), FORMAT, (VERSION,), WRITER)
    return undamaged(
        path,
        lambda: EstimatorRecord(
            {str(name): graph_record(path, graph) for name, graph in found["graphs"].items()},
            found["parallel_calls"],
            CostModel(**found["cost"]),
            float(found["lag"]),
        ),
    )
