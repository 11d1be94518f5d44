"""A data set of reasoning problems by name."""

import os
from collections.abc import Iterator
from itertools import islice

from sparsity.arguments import whole_number
from sparsity.datasets.rows import Row, hub_rows, local_rows
from sparsity.datasets.table import DATASETS
from sparsity.errors import SparsityError
from sparsity.problem import Problem


def load(
    name: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    path: str | os.PathLike[str] | None = None,
) -> tuple[Problem, ...]:
    """The problems of a data set, in its order; each asks for the answer in a box.

    Args:
        name: one of `DATASETS`.
        split: of the hub's; by default the one that the data set is reported on.
        limit: how many problems, at most; None for all.
        path: a local file of the data set's format, as its authors or the hub publish it (JSON,
            JSON Lines, either gzipped, Parquet, CSV, Arrow), instead of the hub.

    Raises:
        SparsityError: no such data set, one that cannot be had (it says what to install, or to give
            a file), a row of another format, a split of a local file.
    """
    if name not in DATASETS:
        raise SparsityError(f"no data set {name!r}; there are {', '.join(DATASETS)}")
    if limit is not None:
        limit = whole_number("limit", limit, least=1)
    problems = tuple(islice(_problems(name, split, path), limit))
    if not problems:
        raise SparsityError(f"{path or name} has no rows")
    return problems


def _problems(
    name: str, split: str | None, path: str | os.PathLike[str] | None
) -> Iterator[Problem]:
    known = DATASETS[name]
    if path is not None and split is not None:
        raise SparsityError(f"{path} is one file: leave out split, or path")
    if path is not None:
        rows, where = local_rows(path), str(path)
    else:
        rows = hub_rows(name, known.repository, known.subset, split or known.split)
        where = name
    for index, row in enumerate(rows):
        yield _of_row(name, row, f"{where}, row {index}, is no row of {name}")


def _of_row(name: str, row: Row, where: str) -> Problem:
    known = DATASETS[name]
    try:
        return known.problem(row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SparsityError(
            f"{where} ({type(error).__name__}: {error}); expected the columns {known.columns}"
        ) from error
