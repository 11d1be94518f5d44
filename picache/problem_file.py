"""Problems and texts from files, checked entry by entry."""

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from picache.arguments import whole_number
from picache.errors import PICacheError
from picache.problem import Problem

_LISTED = (
    'a list of {"documents": [...], "question": "...", "answers": [...]}, the same a line in a '
    '.jsonl file, or {"passages": [{"text": "..."}], "questions": [{"passage": 0, "question": '
    '"...", "answer": "..."}]}'
)
_TEXTS = '{"texts": [{"text": "..."}]}, or a .txt file, which is one text'


def load_problems(
    path: str | os.PathLike[str], *, documents: int = 5, seed: int = 0
) -> tuple[Problem, ...]:
    """Questions on documents, read from a file, in its order.

    Two forms are read. The plain one is a list of objects with the fields of `Problem`, of which
    ``documents`` and ``question`` are needed; in a ``.jsonl`` file one stands on each line. The
    other has passages and questions: ``{"instruction": "...", "passages": [{"text": "..."}],
    "questions": [{"passage": 0, "question": "...", "lead": "...", "answer": "..."}]}``, the
    instruction and the leads optional. There each question is put to its own passage and to others,
    drawn and shuffled by the seed and the question's place in the file. Other fields are ignored.

    Args:
        path: a JSON or JSON Lines file in UTF-8.
        documents: how many passages a question is put to; of the form with passages alone.
        seed: draws the other passages.

    Raises:
        PICacheError: the file cannot be read or is of another form; it names the file, the entry
            and what was expected.
    """
    file = Path(path)
    found = _read(file, _LISTED)
    if isinstance(found, Mapping) and {"passages", "questions"} <= set(found):
        return _questions(file, found, documents, seed)
    if not isinstance(found, list) or not found:
        raise PICacheError(f"{file} holds {_kind(found)}; expected {_LISTED}")
    return tuple(_listed(file, index, entry) for index, entry in enumerate(found))


def load_texts(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Texts read from a file, in its order.

    Args:
        path: a JSON file in UTF-8 with ``{"texts": [{"text": "..."}]}``, where other fields are
            ignored and a text may also stand by itself; or a ``.txt`` file, which is one text.

    Raises:
        PICacheError: the file cannot be read or is of another form; it names the file, the entry
            and what was expected.
    """
    file = Path(path)
    if file.suffix == ".txt":
        whole = _content(file, _TEXTS)
        if not whole.strip():
            raise PICacheError(f"{file} is empty; expected {_TEXTS}")
        return (whole,)
    found = _read(file, _TEXTS)
    listed = found.get("texts") if isinstance(found, Mapping) else None
    if not isinstance(listed, list) or not listed:
        raise PICacheError(f"{file} holds {_kind(found)}; expected {_TEXTS}")
    texts: list[str] = []
    for index, entry in enumerate(listed):
        text: object = entry.get("text") if isinstance(entry, Mapping) else entry
        if not isinstance(text, str) or not text.strip():
            raise PICacheError(
                f'{file}, text {index}: expected a text that is not empty, or {{"text": "..."}}, '
                f"got {_short(entry)}"
            )
        texts.append(text)
    return tuple(texts)


def holds_texts(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one for `load_texts`: a .txt file, or an object with "texts"."""
    file = Path(path)
    if file.suffix == ".txt":
        return True
    found = _read(file, f"{_LISTED}; or {_TEXTS}")
    return isinstance(found, Mapping) and "texts" in found


def _questions(
    file: Path, found: Mapping[str, Any], documents: int, seed: int
) -> tuple[Problem, ...]:
    """Each question with its own passage among others."""
    passages = _strings(file, "passage", found["passages"], "text")
    questions = found["questions"]
    count = whole_number("load_problems needs a whole number of documents", documents, least=1)
    if count > len(passages):
        raise PICacheError(
            f"{file} has {len(passages)} passages and documents={count} were asked for: give at "
            f"most {len(passages)}"
        )
    _strings(file, "question", questions, "question", "answer")
    problems = []
    for index, entry in enumerate(questions):
        own = entry.get("passage")
        if isinstance(own, bool) or not isinstance(own, int) or not 0 <= own < len(passages):
            raise PICacheError(
                f'{file}, question {index}: expected "passage" to be the place of its passage, 0 '
                f"to {len(passages) - 1}, got {_short(own)}"
            )
        draw = random.Random(f"{seed}:{index}")  # a question keeps its documents wherever N ends
        places = [own, *draw.sample([i for i in range(len(passages)) if i != own], count - 1)]
        draw.shuffle(places)
        fields = {
            "documents": [passages[place] for place in places],
            "question": entry["question"],
            "answers": [entry["answer"]],
            "instruction": found.get("instruction", ""),
            "lead": entry.get("lead", ""),
        }
        problems.append(_listed(file, index, fields, "question"))
    return tuple(problems)


def _strings(file: Path, what: str, entries: object, *names: str) -> list[str]:
    """The first of the named fields of every entry; all of them have to be texts."""
    if not isinstance(entries, list) or not entries:
        raise PICacheError(f"{file}: expected a list of {what}s, got {_short(entries)}")
    for index, entry in enumerate(entries):
        given = entry if isinstance(entry, Mapping) else {}
        for name in names:
            if not isinstance(given.get(name), str) or not given[name]:
                raise PICacheError(
                    f'{file}, {what} {index}: expected an object with a text "{name}", got '
                    f"{_short(entry)}"
                )
    return [entry[names[0]] for entry in entries]


def _listed(file: Path, index: int, entry: object, what: str = "problem") -> Problem:
    """One problem of a list."""
    where = f"{file}, {what} {index}"
    if not isinstance(entry, Mapping) or not {"documents", "question"} <= set(entry):
        raise PICacheError(
            f'{where}: expected an object with "documents" and "question", got {_short(entry)}'
        )
    for name in ("documents", "answers"):
        if not isinstance(entry.get(name, []), list):
            raise PICacheError(
                f'{where}: expected "{name}" to be a list of texts, got {_short(entry[name])}'
            )
    for name in ("instruction", "lead"):
        if not isinstance(entry.get(name, ""), str):
            raise PICacheError(
                f'{where}: expected "{name}" to be a text, got {_short(entry[name])}'
            )
    try:
        return Problem(
            tuple(entry["documents"]),
            entry["question"],
            tuple(entry.get("answers", ())),
            entry.get("instruction", ""),
            entry.get("lead", ""),
        )
    except PICacheError as error:
        raise PICacheError(f"{where}: {error}") from error


def _read(file: Path, expected: str) -> object:
    """What a JSON or JSON Lines file holds."""
    content = _content(file, expected)
    if file.suffix != ".jsonl":
        return _parsed(content, str(file), expected)
    lines = enumerate(content.splitlines(), start=1)
    return [_parsed(line, f"{file}, line {n}", expected) for n, line in lines if line.strip()]


def _content(file: Path, expected: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PICacheError(f"{file} cannot be read ({error}); expected {expected}") from error


def _parsed(text: str, where: str, expected: str) -> object:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PICacheError(f"{where} is no JSON ({error}); expected {expected}") from error


def _kind(found: object) -> str:
    if isinstance(found, Mapping):
        return f"an object with {', '.join(map(repr, found)) or 'nothing'}"
    return "an empty list" if found == [] else _short(found)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
