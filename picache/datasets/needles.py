"""Needles in haystacks, generated as RULER does (arXiv 2404.06654, section 3)."""

import random

from picache.arguments import whole_number
from picache.errors import PICacheError
from picache.problem import Problem

_HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_FIRST = (
    "amber brave calm dusty eager fancy gentle hollow idle jolly keen lively mellow noble".split()
)
_SECOND = (
    "anchor barrel candle desert engine falcon garden harbor island jacket kettle ladder".split()
)


def needles(
    count: int, *, documents: int = 10, repeats: int = 8, seed: int = 0
) -> tuple[Problem, ...]:
    """Problems with one needle in each document, of which one is asked for (RULER's multi-key).

    A needle is "One of the special magic numbers for KEY is: VALUE."; keys are two words, values
    seven digits. The hay is RULER's noise, one sentence over and over.

    Departures: the hay is cut into documents, one needle in each; keys are of 168 pairs of words.

    Args:
        count: how many problems.
        documents: in each, with one needle each; at most 168.
        repeats: of the hay in a document, of 19 words each.
        seed: draws keys, values, places and the question.

    Raises:
        PICacheError: a number that is none, or out of these bounds.
    """
    count = whole_number("needles needs a whole number as count", count, least=1)
    documents = whole_number("needles needs a whole number of documents", documents, least=1)
    repeats = whole_number("needles needs a whole number of repeats", repeats, least=1)
    keys = [f"{first}-{second}" for first in _FIRST for second in _SECOND]
    if documents > len(keys):
        raise PICacheError(f"needles has {len(keys)} keys: documents={documents} is too many")
    return tuple(
        _problem(random.Random(f"{seed}:{index}"), keys, documents, repeats)
        for index in range(count)
    )


def _problem(draw: random.Random, keys: list[str], documents: int, repeats: int) -> Problem:
    hidden = draw.sample(keys, documents)
    values = [str(value) for value in draw.sample(range(1_000_000, 10_000_000), documents)]
    texts = []
    for key, value in zip(hidden, values, strict=True):
        hay = [_HAY] * repeats
        hay.insert(
            draw.randint(0, repeats), f"One of the special magic numbers for {key} is: {value}."
        )
        texts.append(" ".join(hay))
    asked = draw.randrange(documents)
    return Problem(
        tuple(texts),
        f"What is the special magic number for {hidden[asked]} mentioned in the provided text?",
        (values[asked],),
        "Some special magic numbers are hidden within the following text. Make sure to memorize "
        "them. I will quiz you about the numbers afterwards.",
        f"The special magic number for {hidden[asked]} mentioned in the provided text is",
    )
