"""A data set by name, and questions put among the documents of others."""

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from picache.arguments import whole_number
from picache.datasets.rows import hub_rows, local_rows
from picache.datasets.table import DATASETS, DataSet
from picache.errors import PICacheError
from picache.problem import Problem


def load(
    name: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
    path: str | os.PathLike[str] | None = None,
) -> tuple[Problem, ...]:
    """The problems of a data set, in its order.

    Args:
        name: one of `DATASETS`.
        split: of the hub's; by default the one that has answers and was not trained on.
        subset: of the hub's, such as "narrativeqa" of "longbench"; by default the table's.
        limit: how many problems, at most; None for all.
        path: a local file of the data set's format, as its authors or the hub publish it (JSON,
            JSON Lines, either gzipped, Parquet, CSV, Arrow), instead of the hub.

    Raises:
        PICacheError: no such data set, one that cannot be had (it says what to install, or to give
            a file), a row of another format, a split or subset of a local file.
    """
    if name not in DATASETS:
        raise PICacheError(f"no data set {name!r}; there are {', '.join(DATASETS)}")
    if limit is not None:
        limit = whole_number("load needs a whole number as limit", limit, least=1)
    problems = tuple(islice(_problems(name, split, subset, path), limit))
    if not problems:
        raise PICacheError(f"{path or name} has no row that asks anything with an answer")
    return problems


def _problems(
    name: str, split: str | None, subset: str | None, path: str | os.PathLike[str] | None
) -> Iterator[Problem]:
    known = DATASETS[name]
    if path is not None:
        if split is not None or subset is not None:
            raise PICacheError(f"{path} is one file: leave out split and subset, or path")
        rows, where = local_rows(path), str(path)
    else:
        subset = known.subset if subset is None else subset
        if subset == "":
            raise PICacheError(f'{name} has subsets: give one, such as subset="hotpotqa"')
        rows, where = hub_rows(name, known.repository, subset, split or known.split), name
    for index, row in enumerate(rows):
        yield from _of_row(known, row, f"{where}, row {index}, is no row of {name}")


def _of_row(known: DataSet, row: object, where: str) -> tuple[Problem, ...]:
    try:
        return tuple(known.problems(row))  # type: ignore[arg-type]  # a wrong row is told here
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PICacheError(
            f"{where} ({type(error).__name__}: {error}); expected the columns {known.columns}"
        ) from error


def among(problems: Sequence[Problem], documents: int, *, seed: int = 0) -> tuple[Problem, ...]:
    """Every problem with documents of the others added to its own, shuffled.

    What is added holds none of the problem's answers, so that its own documents answer it.

    Args:
        problems: such as SQuAD's, which have one document each.
        documents: how many each has afterwards, its own among them.
        seed: draws and shuffles.

    Raises:
        PICacheError: the problems have too few other documents, or a problem has more already.
    """
    count = whole_number("among needs a whole number of documents", documents, least=1)
    pool = {text: text.lower() for problem in problems for text in problem.documents}
    found = []
    for index, problem in enumerate(problems):
        draw = random.Random(f"{seed}:{index}")
        answers = [answer.lower() for answer in problem.answers]
        others = (
            text
            for text in draw.sample(list(pool), len(pool))
            if text not in problem.documents and not any(a in pool[text] for a in answers)
        )
        missing = count - len(problem.documents)
        texts = [*problem.documents, *islice(others, max(missing, 0))]
        if len(texts) != count:
            raise PICacheError(
                f"problem {index} has {len(problem.documents)} documents and all together "
                f"{len(pool)}: without those that hold its answer, documents={count} is not to be "
                "had"
            )
        draw.shuffle(texts)
        found.append(replace(problem, documents=tuple(texts)))
    return tuple(found)
