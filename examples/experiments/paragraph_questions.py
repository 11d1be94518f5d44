"""Questions on paragraphs, one chunk each, of four public data sets, and a lookup task made of one.

The files are those of the data sets' repositories: XQuAD (English), HotpotQA in its distractor
setting, MuSiQue, and Natural Questions with the passage that answers each. Nothing is fetched.
"""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from picache import Problem
from picache.datasets import load
from picache.datasets.formats import INSTRUCTION, LEAD

DOCUMENTS = 10
"""Paragraphs a question is put to, where the data set does not say."""
WORDS = (
    "silver garden window dragon coffee summer yellow castle forest bridge winter orange "
    "mirror planet rocket basket button carpet engine island jacket kitten ladder marble"
).split()
"""Passwords of the lookup task; one token each of most vocabularies."""


def xquad(folder: Path, draw: random.Random) -> Iterator[Problem]:
    """A question on a paragraph of an article, among paragraphs of other articles."""
    articles = _articles(folder)
    asked = [
        (place, paragraph, question)
        for place, article in enumerate(articles)
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    for place, paragraph, question in draw.sample(asked, len(asked)):
        others = draw.sample([a for i, a in enumerate(articles) if i != place], DOCUMENTS - 1)
        texts = [draw.choice(other["paragraphs"])["context"] for other in others]
        answers = [answer["text"] for answer in question["answers"]]
        yield _problem(draw, paragraph["context"], texts, question["question"], answers)


def natural_questions(folder: Path, draw: random.Random) -> Iterator[Problem]:
    """A question on the passage that answers it, among passages that answer others."""
    path = folder / "nq_open_oracle" / "nq_open_oracle.jsonl.gz"
    entries = [json.loads(line) for line in _read(path).splitlines()]
    for entry in draw.sample(entries, len(entries)):
        others = [e["text"] for e in draw.sample(entries, DOCUMENTS) if e is not entry]
        question = f"{entry['question'].capitalize()}?"
        yield _problem(draw, entry["text"], others[: DOCUMENTS - 1], question, entry["answers"])


def hotpotqa(folder: Path, draw: random.Random) -> Iterator[Problem]:
    """A question that takes two of ten paragraphs to answer."""
    yield from load("hotpotqa", path=folder / "hotpotqa" / "hotpotqa_train_100.jsonl.gz")


def musique(folder: Path, draw: random.Random) -> Iterator[Problem]:
    """A question that takes two to four of twenty paragraphs to answer."""
    yield from load("musique", path=folder / "musique" / "musique_train_100.json.gz")


def lookup(folder: Path, draw: random.Random) -> Iterator[Problem]:
    """Each of ten paragraphs of XQuAD holds a password for its article; one is asked for."""
    articles = _articles(folder)
    while True:
        words = draw.sample(WORDS, DOCUMENTS)
        texts, names = [], []
        for article, word in zip(draw.sample(articles, DOCUMENTS), words, strict=True):
            name = article["title"].replace("_", " ")
            parts = draw.choice(article["paragraphs"])["context"].split(". ")
            parts.insert(len(parts) // 2, f"The secret password for {name} is {word}")
            texts.append(". ".join(parts))
            names.append(name)
        asked = draw.randrange(DOCUMENTS)
        said = f"secret password for {names[asked]}"
        yield Problem(
            tuple(texts), f"What is the {said}?", (words[asked],), INSTRUCTION, f"The {said} is"
        )


TASKS: dict[str, Callable[[Path, random.Random], Iterator[Problem]]] = {
    "lookup": lookup,
    "XQuAD": xquad,
    "Natural Questions": natural_questions,
    "HotpotQA": hotpotqa,
    "MuSiQue": musique,
}


def questions(
    task: str, folder: Path, count: int, seed: int, fits: Callable[[Problem], bool]
) -> list[Problem]:
    """The first `count` problems of a task that fit, or all there are."""
    found: list[Problem] = []
    for problem in TASKS[task](folder, random.Random(f"{task} {seed}")):
        if len(found) == count:
            break
        if fits(problem):
            found.append(problem)
    return found


def _articles(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(_read(folder / "xquad_en" / "xquad.en.json"))["data"]
    return found


def _read(path: Path) -> str:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()).decode()
    return path.read_text(encoding="utf-8")


def _problem(
    draw: random.Random, own: str, others: list[str], question: str, answers: list[str]
) -> Problem:
    texts = [own, *others]
    draw.shuffle(texts)
    return _asked(texts, question, answers)


def _asked(texts: list[str], question: str, answers: list[str]) -> Problem:
    given = tuple(answer for answer in answers if answer.strip())
    return Problem(tuple(texts), question, given, INSTRUCTION, LEAD)
