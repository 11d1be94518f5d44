"""From files to records: lines of JSON, rows of CSV, whole JSON documents; gzipped or not."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from demand.errors import DemandError
from demand.traces.fields import LONGEST_QUOTE, Clock, Fields, MalformedRecordError

Records = Iterator[Fields | MalformedRecordError]
"""Records in order; one that cannot be decoded stands as its error, so that it can be skipped."""

Source = Callable[[Path, Clock, int], Records]
"""(file or folder, clock, most characters of a line) to records. No more than that much of a file
is in memory at once, however far a compressed one grows."""


_PIECE = 1 << 16  # characters read at once of a line that is passed over


def json_lines(path: Path, clock: Clock, line_limit: int) -> Records:
    """One JSON object a line; `path` is a file or a folder of .jsonl or .jsonl.gz files.

    Raises:
        DemandError: a file that is one JSON document (over several lines, a list, or records under
            their names), or a row of such as are printed over several lines.
    """
    for file in _files(path, (".jsonl", ".jsonl.gz")):
        begun = False
        for number, line in _lines(file, line_limit):
            if line is None:
                yield _too_long(file, number, line_limit)
            elif line.strip():
                record = _json_object(line, file, number, clock)
                if not begun and _looks_whole(record):
                    _refuse_document(file, line_limit)
                begun = True
                yield record


def _looks_whole(record: Fields | MalformedRecordError) -> bool:
    """Whether a first line may be part of one document: no record, or records under their names."""
    if isinstance(record, MalformedRecordError):
        return True
    return bool(record.values) and all(isinstance(v, dict) for v in record.values.values())


def _refuse_document(file: Path, line_limit: int) -> None:
    """Raise `DemandError` if `file`, which holds no JSON lines, is one document, or a row of them.

    Read line by line, it would be thousands of malformed lines, or some that look like records.
    """
    with _reading(file) as text:
        whole = text.read(line_limit + 1)
    if len(whole) > line_limit:
        return
    begin = len(whole) - len(whole.lstrip())
    try:
        document, end = json.JSONDecoder().raw_decode(whole, begin)
    except (ValueError, RecursionError):
        return
    if not isinstance(document, dict | list):
        return
    lines = whole.count("\n", begin, end) + 1
    more = bool(whole[end:].strip())
    if more and lines == 1:
        return  # the first line alone is no record
    nested = isinstance(document, list) or all(isinstance(v, dict) for v in document.values())
    of = "a list" if isinstance(document, list) else "an object"
    shown = "gunzip -c" if file.suffix == ".gz" else "cat"
    raise DemandError(
        f"{file} is {'several JSON documents, the first' if more else 'one JSON document,'} {of} "
        f"of {len(document)} over {lines} line{'s' if lines > 1 else ''}; expected JSON "
        f"lines, one object a line: {shown} {file.name} | jq -c '{'.[]' if nested else '.'}' > "
        f"{file.name.split('.')[0]}.jsonl, and read that"
    )


def json_documents(path: Path, clock: Clock, line_limit: int) -> Records:
    """One JSON object a file; `path` is a file or a folder of .json or .json.gz files."""
    return _json_documents((".json", ".json.gz"), False, path, clock, line_limit)


def nested_documents(*suffixes: str) -> Source:
    """As `json_documents`, of files with these endings, which lie in folders of `path`, too."""
    return partial(_json_documents, suffixes, True)


def _json_documents(
    suffixes: tuple[str, ...], nested: bool, path: Path, clock: Clock, line_limit: int
) -> Records:
    for file in _files(path, suffixes, nested):
        with _reading(file) as text:
            whole = text.read(line_limit + 1)
        if len(whole) > line_limit:
            yield _too_long(file, 1, line_limit)
        else:
            yield _json_object(whole, file, 1, clock)


def json_members(path: Path, clock: Clock, line_limit: int) -> Records:
    """As `json_documents`, but each member of the object is a record: one field, under its key."""
    for document in json_documents(path, clock, line_limit):
        if isinstance(document, MalformedRecordError):
            yield document
            continue
        for name, value in document.values.items():
            yield Fields({name: value}, document.file, document.line, clock)


def text_lines(path: Path, clock: Clock, line_limit: int) -> Records:
    """Lines of text, each a record {line}; `path` is a file or a folder of .txt or .log files."""
    for file in _files(path, (".txt", ".log")):
        for number, line in _lines(file, line_limit):
            if line is None:
                yield _too_long(file, number, line_limit)
            else:
                yield Fields({"line": line}, file, number, clock)


def csv_rows(*columns: str) -> Source:
    """Rows of CSV whose header names at least `columns`; `path` is a file or a folder.

    A row is one line: a quote that is never closed spoils its own line alone.
    """
    return partial(_csv_rows, columns)


def _csv_rows(columns: tuple[str, ...], path: Path, clock: Clock, line_limit: int) -> Records:
    for file in _files(path, (".csv", ".csv.gz")):
        with closing(_lines(file, line_limit)) as lines:
            first = next(lines, (1, ""))[1]
            if first is None:
                raise _too_long(file, 1, line_limit)
            header = _header(columns, file, first)
            for number, line in lines:
                if line is None:
                    yield _too_long(file, number, line_limit)
                    continue
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


def _files(path: Path, suffixes: tuple[str, ...], nested: bool = False) -> list[Path]:
    if not path.is_dir():
        return [path]
    inside = path.rglob("*") if nested else path.iterdir()
    files = sorted(file for file in inside if file.name.endswith(suffixes))
    if not files:
        raise DemandError(f"folder {path} has no {' or '.join(suffixes)} file; give a file")
    return files


def _lines(file: Path, limit: int) -> Generator[tuple[int, str | None], None, None]:
    """Lines by number; None for one of more than `limit` characters, which is passed over."""
    number = 0
    with _reading(file, lambda: number + 1) as text:
        while line := text.readline(limit + 1):
            number += 1
            if len(line) <= limit:
                yield number, line
                continue
            while line and not line.endswith(("\n", "\r")):
                line = text.readline(min(limit, _PIECE))
            yield number, None


def _too_long(file: Path, number: int, limit: int) -> MalformedRecordError:
    return MalformedRecordError(
        file,
        number,
        "",
        "too long a line",
        f"more than {limit:,} characters; raise line_limit= if it is meant",
    )


@contextmanager
def _reading(file: Path, line: Callable[[], int] = lambda: 1) -> Iterator[IO[str]]:
    """The text of a file; what cannot be read is an error at the line that `line` gives."""
    with _opened(file) as text:
        try:
            yield text
        except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
            raise DemandError(
                f"{file}, line {line()}: cannot be read: {error}; fetch the file again"
            ) from error


def _opened(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")
