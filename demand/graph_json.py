"""The file format of a demand graph: versioned JSON, written atomically, checked on read."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from demand.errors import DemandError
from demand.units import END, CostModel, Execution, Unit

FORMAT = "demand.PDGraph"
VERSION = 1


@dataclass(frozen=True)
class GraphRecord:
    """Everything a `PDGraph` remembers."""

    name: str
    window: int
    cost: CostModel
    units: tuple[Unit, ...]
    entries: tuple[str, ...]
    samples: Mapping[str, tuple[tuple[Execution, str], ...]]


def write_graph(path: str | os.PathLike[str], record: GraphRecord) -> None:
    """Write `record` to `path`, in one step as far as readers can see.

    The file holds, for each unit, rows of [input_tokens, output_tokens, parallelism, seconds,
    successor], oldest first; seconds is null for an llm.
    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "name": record.name,
        "window": record.window,
        "cost": asdict(record.cost),
        "entries": record.entries,
        "units": [
            {
                "name": unit.name,
                "kind": unit.kind,
                "samples": [[*_row(e), successor] for e, successor in record.samples[unit.name]],
            }
            for unit in record.units
        ],
    }
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def read_graph(path: str | os.PathLike[str]) -> GraphRecord:
    """Read what `write_graph` wrote, checking every entry.

    Raises:
        DemandError: the file is not such a document, with what is wrong and where.
        FileNotFoundError: no file at `path`.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        message = f"{path} is not JSON ({error}); expected a file that PDGraph.save wrote"
        raise DemandError(message) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DemandError(f"{path} is not a {FORMAT} file; expected one that PDGraph.save wrote")
    if document.get("version") != VERSION:
        raise DemandError(
            f"{path} has format version {document.get('version')!r}; this package reads version "
            f"{VERSION}: save the graph again with a matching package"
        )
    try:
        return _record(document)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DemandError(
            f"{path} is damaged: {type(error).__name__}: {error}; save the graph again"
        ) from error


def _row(execution: Execution) -> list[float | None]:
    return [
        execution.input_tokens,
        execution.output_tokens,
        execution.parallelism,
        execution.seconds,
    ]


def _record(document: dict[str, Any]) -> GraphRecord:
    units = tuple(Unit(entry["name"], entry["kind"]) for entry in document["units"])
    names = {unit.name for unit in units}
    if len(names) < len(units):
        raise DemandError("a unit is listed twice")
    samples = {
        unit.name: tuple(_sample(unit, row, names) for row in entry["samples"])
        for unit, entry in zip(units, document["units"], strict=True)
    }
    for name, rows in samples.items():
        if not rows:
            raise DemandError(f"unit {name!r} has no samples")
    entries = tuple(document["entries"])
    strangers = set(entries) - names
    if strangers or not entries:
        raise DemandError(f"entries are {sorted(strangers)}; expected names of listed units")
    return GraphRecord(
        str(document["name"]),
        int(document["window"]),
        CostModel(**document["cost"]),
        units,
        entries,
        samples,
    )


def _sample(unit: Unit, row: list[Any], names: set[str]) -> tuple[Execution, str]:
    input_tokens, output_tokens, parallelism, seconds, successor = row
    if successor != END and successor not in names:
        raise DemandError(f"unit {unit.name!r} is followed by {successor!r}, which is not a unit")
    return Execution(unit, input_tokens, output_tokens, parallelism, seconds), successor
