"""The rows of a data set: from a local file, or from the hub by the library `datasets`."""

import gzip
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from picache.errors import PICacheError

Row = Mapping[str, Any]

_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_INSTALL = "pip install 'picache[datasets]'"


def local_rows(path: str | os.PathLike[str]) -> Iterable[Row]:
    """The rows of a file: JSON or JSON Lines (gzipped or not), Parquet, CSV or Arrow.

    JSON is a list of rows, or an object that has it under "data", as SQuAD's. It is read without
    `datasets`, whose tables cannot hold the lists of a title and sentences that HotpotQA's and
    2WikiMultihopQA's files have.

    Raises:
        PICacheError: the file cannot be read, or is of another form.
    """
    file = Path(path)
    kind = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    if kind in _BUILDERS:
        return _opened(f"{file} cannot be read", _BUILDERS[kind], data_files=str(file))
    if kind not in (".json", ".jsonl"):
        raise PICacheError(
            f"{file}: expected a file whose name ends with .json, .jsonl (or these with .gz), "
            f"{', '.join(_BUILDERS)}"
        )
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
        lines = [line for line in text.split("\n") if line.strip()] if kind == ".jsonl" else []
        found = [json.loads(line) for line in lines] if kind == ".jsonl" else json.loads(text)
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise PICacheError(f"{file} cannot be read: {_first_line(error)}") from error
    if isinstance(found, Mapping):
        found = found.get("data")
    if not isinstance(found, list) or not all(isinstance(row, Mapping) for row in found):
        raise PICacheError(
            f'{file} holds no rows: expected a list of objects, or {{"data": [...]}}'
        )
    return found


def hub_rows(name: str, repository: str, subset: str | None, split: str) -> Iterable[Row]:
    """The rows of a data set of the hub, downloaded or from the cache of `datasets`.

    Args:
        name: of the data set, for errors.
        repository: on the hub.
        subset: of the repository's; None where it has but one.
        split: such as "validation", or "validation[:100]".

    Raises:
        PICacheError: `datasets` is missing, or the data set cannot be had.
    """
    failed = (
        f"{name} ({repository}, {subset or 'default'}, {split}) cannot be had from the hub: give "
        "path=FILE, a copy of the data set's own file"
    )
    return _opened(failed, repository, subset, split=split)


def _opened(failed: str, *given: str | None, split: str = "train", **files: str) -> Iterable[Row]:
    """What `datasets.load_dataset` gives; the one split of local files is called "train"."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise PICacheError(f"{failed}; this needs the library datasets: {_INSTALL}") from error
    try:
        found: Iterable[Row] = load_dataset(*given, split=split, **files)
    except Exception as error:  # whatever is wrong: the network, the split, the columns, the disk
        raise PICacheError(f"{failed} ({_first_line(error)})") from error
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
