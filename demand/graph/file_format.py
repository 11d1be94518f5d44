"""The file of a saved demand graph: versioned JSON, written in one step, checked as it is read."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from demand.arguments import file_to_write
from demand.errors import DemandError
from demand.graph.given_units import GivenUnit, check_given
from demand.units import CostModel, Execution, Unit

FORMAT = "demand.PDGraph"
VERSION = 2
"""Of files without `shared_tokens`: the releases from before there were any read them, too."""
SHARED_TOKENS_VERSION = 3
"""Of files with a row that has them."""
AFTER_VERSION = 4
"""Of files with a row that says which units its own waits for."""

Read = TypeVar("Read")


@dataclass(frozen=True)
class GraphRecord:
    """Everything that is saved of a `PDGraph`: its settings, and its runs or the given units."""

    name: str
    window: int
    cost: CostModel
    half_life_runs: float | None
    runs: Sequence[Sequence[Execution]] = ()
    given: Sequence[GivenUnit] = ()
    entries: Mapping[str, float] = field(default_factory=dict)


def write_graph(path: str | os.PathLike[str], record: GraphRecord) -> None:
    """Write `record` to `path`, in one step as far as readers can see."""
    write_document(path, graph_document(record))


def read_graph(path: str | os.PathLike[str]) -> GraphRecord:
    """Read what `write_graph` wrote, checking every entry.

    Raises:
        DemandError: the file is not such a document, with what is wrong and where.
        FileNotFoundError: no file at `path`.
    """
    return graph_record(path, read_document(path, "PDGraph.save"))


def graph_document(record: GraphRecord) -> dict[str, Any]:
    """`record` as a JSON object.

    It lists the units by name and kind, then either `runs`, oldest first, with a row
    [position of the unit, input_tokens, output_tokens, parallelism, seconds,
    longest_output_tokens, longest_seconds] for each execution, followed by shared_tokens and by the
    list after where they are given; or `given`, with such rows and the successors of each unit in
    turn, and `entries`. Tokens and seconds are per call; null: not given.
    """
    executions = [
        execution
        for each in (*record.runs, *(given.executions for given in record.given))
        for execution in each
    ]
    version = VERSION
    if any(execution.shared_tokens is not None for execution in executions):
        version = SHARED_TOKENS_VERSION
    if any(execution.after is not None for execution in executions):
        version = AFTER_VERSION
    executed = dict.fromkeys(execution.unit for run in record.runs for execution in run)
    units = [*(given.unit for given in record.given), *executed]
    number = {unit: position for position, unit in enumerate(units)}
    document = {
        "format": FORMAT,
        "version": version,
        "name": record.name,
        "window": record.window,
        "half_life_runs": record.half_life_runs,
        "cost": asdict(record.cost),
        "units": [{"name": unit.name, "kind": unit.kind} for unit in units],
    }
    if record.given:
        document["entries"] = record.entries
        document["given"] = [
            {
                "executions": [_row(number, execution) for execution in given.executions],
                "successors": given.successors,
            }
            for given in record.given
        ]
    else:
        document["runs"] = [[_row(number, execution) for execution in run] for run in record.runs]
    return document


def graph_record(path: str | os.PathLike[str], document: object) -> GraphRecord:
    """What `graph_document` made an object of, checking every entry.

    Args:
        path: of the file that `document` was in, for errors.
        document: what was read.

    Raises:
        DemandError: it is not such a document, with what is wrong and where.
    """
    versions = (VERSION, SHARED_TOKENS_VERSION, AFTER_VERSION)
    checked = check_format(path, document, FORMAT, versions, "PDGraph.save")
    return undamaged(path, lambda: _record(checked))


def write_document(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Write JSON to `path` in one step: a reader sees the old file or the new, never half.

    Raises:
        DemandError: a path that is a folder, or in a folder that is missing.
    """
    target = file_to_write("path", path)
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


def read_document(path: str | os.PathLike[str], writer: str) -> object:
    """The JSON at `path`.

    Args:
        path: of the file.
        writer: what writes such files, for errors.

    Raises:
        DemandError: it is not JSON.
        FileNotFoundError: no file at `path`.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # too deep, too long an integer, not UTF-8
        message = f"{path} is not JSON ({error}); expected a file that {writer} wrote"
        raise DemandError(message) from error


def check_format(
    path: str | os.PathLike[str],
    document: object,
    kind: str,
    versions: Sequence[int],
    writer: str,
) -> dict[str, Any]:
    """`document`, which is an object of this kind and one of these versions, or `DemandError`."""
    if not isinstance(document, dict) or document.get("format") != kind:
        raise DemandError(f"{path} is not a {kind} file; expected one that {writer} wrote")
    if document.get("version") not in versions:
        raise DemandError(
            f"{path} has format version {document.get('version')!r}; this package reads version "
            f"{' and '.join(map(str, versions))}: save it again with a matching package"
        )
    return document


def undamaged(path: str | os.PathLike[str], read: Callable[[], Read]) -> Read:
    """What `read` gives; what it stumbles over in the document at `path` becomes `DemandError`."""
    try:
        return read()
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise DemandError(
            f"{path} is damaged: {type(error).__name__}: {error}; save it again"
        ) from error


def _row(number: Mapping[Unit, int], execution: Execution) -> list[Any]:
    shared, after = execution.shared_tokens, execution.after
    return [
        number[execution.unit],
        execution.input_tokens,
        execution.output_tokens,
        execution.parallelism,
        execution.seconds,
        execution.longest_output_tokens,
        execution.longest_seconds,
        *([] if shared is None and after is None else [shared]),
        *([] if after is None else [after]),
    ]


def _record(document: dict[str, Any]) -> GraphRecord:
    units = [Unit(entry["name"], entry["kind"]) for entry in document["units"]]
    if len({unit.name for unit in units}) < len(units):
        raise DemandError("a unit is listed twice")
    half_life = document["half_life_runs"]
    settings = (
        str(document["name"]),
        int(document["window"]),
        CostModel(**document["cost"]),
        None if half_life is None else float(half_life),
    )
    if "given" in document:
        given = [
            GivenUnit(unit, [_execution(units, row) for row in e["executions"]], e["successors"])
            for unit, e in zip(units, document["given"], strict=True)
        ]
        check_given(given, dict(document["entries"]))
        return GraphRecord(*settings, given=given, entries=dict(document["entries"]))
    return GraphRecord(
        *settings, runs=[[_execution(units, row) for row in run] for run in document["runs"]]
    )


def _execution(units: Sequence[Unit], row: list[Any]) -> Execution:
    position, input_tokens, output_tokens, parallelism, seconds, longest_tokens, longest, *more = (
        row
    )
    if not 0 <= position < len(units):
        raise DemandError(f"there is no unit {position} in a list of {len(units)}")
    return Execution(
        units[position],
        input_tokens,
        output_tokens,
        parallelism,
        seconds,
        longest_tokens,
        longest,
        *more,
    )
