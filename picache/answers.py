"""What counts as the right answer, by SQuAD's rules."""

import string
from collections import Counter

_ARTICLES = frozenset(("a", "an", "the"))


def words(text: str, answer: str) -> tuple[list[str], list[str]]:
    """Words of both in small letters, without punctuation and articles (SQuAD's rule).

    Where that leaves nothing of the answer, such as "A" or "+", both keep what it is made of.
    """
    small = [text.lower(), answer.lower()]
    bare = ["".join(" " if c in string.punctuation else c for c in one).split() for one in small]
    if not bare[1]:
        bare = [one.split() for one in small]
    if set(bare[1]) - _ARTICLES:
        bare = [[word for word in one if word not in _ARTICLES] for one in bare]
    return bare[0], bare[1]


def begins(text: str, answer: str) -> float:
    """1 where `text` begins with the words of `answer`, else 0."""
    found, expected = words(text, answer)
    return float(found[: len(expected)] == expected)


def f1(text: str, answer: str) -> float:
    """Token F1 of SQuAD: overlap of the words of `text` with those of `answer`."""
    found, expected = words(text, answer)
    both = sum((Counter(found) & Counter(expected)).values())
    return 2.0 * both / (len(found) + len(expected)) if both else 0.0
