"""From files to records: lines of JSON, rows of CSV, whole JSON documents; gzipped or not."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import IO

from demand.errors import DemandError
from demand.traces.fields import LONGEST_QUOTE, Clock, Fields, MalformedRecordError

Records = Iterator[Fields | MalformedRecordError]
"""Records in order; one that cannot be decoded stands as its error, so that it can be skipped."""

Source = Callable[[Path, Clock], Records]


def json_lines(path: Path, clock: Clock) -> Records:
    """One JSON object a line; `path` is a file or a folder of .jsonl or .jsonl.gz files."""
    for file in _files(path, (".jsonl", ".jsonl.gz")):
        for number, line in _lines(file):
            if line.strip():
                yield _json_object(line, file, number, clock)


def json_documents(path: Path, clock: Clock) -> Records:
    """One JSON object a file; `path` is a file or a folder of .json or .json.gz files."""
    for file in _files(path, (".json", ".json.gz")):
        yield _json_object("".join(line for _, line in _lines(file)), file, 1, clock)


def json_members(path: Path, clock: Clock) -> Records:
    """As `json_documents`, but each member of the object is a record: one field, under its key."""
    for document in json_documents(path, clock):
        if isinstance(document, MalformedRecordError):
            yield document
            continue
        for name, value in document.values.items():
            yield Fields({name: value}, document.file, document.line, clock)


def csv_rows(*columns: str) -> Source:
    """Rows of CSV whose header names at least `columns`; `path` is a file or a folder.

    A row is one line: a quote that is never closed spoils its own line alone.
    """
    return partial(_csv_rows, columns)


def _csv_rows(columns: tuple[str, ...], path: Path, clock: Clock) -> Records:
    for file in _files(path, (".csv", ".csv.gz")):
        with closing(_lines(file)) as lines:
            header = _header(columns, file, next(lines, (1, ""))[1])
            for number, line in lines:
                try:
                    row = _row(line)
                except csv.Error as error:
                    yield MalformedRecordError(file, number, "", "not CSV", str(error))
                    continue
                if len(row) == len(header):
                    yield Fields(dict(zip(header, row, strict=True)), file, number, clock)
                elif row:
                    seen = f"{len(row)} for a header of {len(header)}"
                    yield MalformedRecordError(file, number, "", "wrong number of columns", seen)


def _header(columns: tuple[str, ...], file: Path, line: str) -> list[str]:
    try:
        header = [name.strip() for name in _row(line)]
    except csv.Error as error:
        raise DemandError(f"{file}, line 1: not CSV: {error}; fetch the file again") from error
    if not set(columns) <= set(header):
        seen = ", ".join(header) or "missing"
        raise DemandError(
            f"{file}, line 1: columns are {seen:.{LONGEST_QUOTE}}; expected {', '.join(columns)}"
        )
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise DemandError(
            f"{file}, line 1: columns {', '.join(twice)} come twice; rename all but one of each"
        )
    return header


def _row(line: str) -> list[str]:
    return next(csv.reader([line], strict=True), [])


def _json_object(text: str, file: Path, line: int, clock: Clock) -> Fields | MalformedRecordError:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        return MalformedRecordError(file, line + error.lineno - 1, "", "not JSON", str(error))
    except (ValueError, RecursionError) as error:  # too long an integer, too deep a nesting
        return MalformedRecordError(file, line, "", "JSON that cannot be read", str(error))
    if not isinstance(values, dict):
        return MalformedRecordError(
            file, line, "", "expected a JSON object", f"seen: {type(values).__name__}"
        )
    return Fields(values, file, line, clock)


def _files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.name.endswith(suffixes))
    if not files:
        raise DemandError(f"folder {path} has no {' or '.join(suffixes)} file; give a file")
    return files


def _lines(file: Path) -> Generator[tuple[int, str], None, None]:
    number = 0
    with _opened(file) as text:
        try:
            for line in text:
                number += 1
                yield number, line
        except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
            raise DemandError(
                f"{file}, line {number + 1}: cannot be read: {error}; fetch the file again"
            ) from error


def _opened(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")
