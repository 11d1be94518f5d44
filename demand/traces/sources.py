"""From files to records: lines of JSON, rows of CSV, whole JSON documents; gzipped or not."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import IO, Any

from demand.errors import DemandError
from demand.traces.fields import Clock, Fields, MalformedRecordError

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


def csv_rows(*columns: str) -> Source:
    """Rows of CSV whose header names at least `columns`; `path` is a file or a folder."""
    return partial(_csv_rows, columns)


def _csv_rows(columns: tuple[str, ...], path: Path, clock: Clock) -> Records:
    for file in _files(path, (".csv", ".csv.gz")):
        with closing(_lines(file)) as lines:
            reader = csv.reader(line for _, line in lines)
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in columns if name not in header]
            if missing:
                raise DemandError(
                    f"{file}, line 1: columns are {', '.join(header) or 'missing'}; "
                    f"expected {', '.join(columns)}"
                )
            for row in _rows(reader, file):
                if len(row) == len(header):
                    values = dict(zip(header, row, strict=True))
                    yield Fields(values, file, reader.line_num, clock)
                elif row:
                    seen = f"{len(row)} for a header of {len(header)}"
                    number = reader.line_num
                    yield MalformedRecordError(file, number, "", "wrong number of columns", seen)


def _rows(reader: Any, file: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise DemandError(f"{file}, line {reader.line_num}: not CSV: {error}") from error


def _json_object(text: str, file: Path, line: int, clock: Clock) -> Fields | MalformedRecordError:
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        at = error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0
        return MalformedRecordError(file, line + at, "", "not JSON", str(error))
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
