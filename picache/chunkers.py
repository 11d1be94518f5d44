"""Texts cut into chunks: by paragraph, by tokens up to a sentence's end, by the tokenizer's seams.

The pieces joined are the text, character by character. A chunk is tokenized by itself, so where a
boundary falls inside a token of the whole text, linked chunks have other tokens than the text has.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from picache.arguments import whole_number
from picache.errors import PICacheError
from picache.seams import WINDOW, Seams, ends_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
_SENTENCE = re.compile(r"[.!?][\"')\]\u2019\u201d]*(?=\s)|\n+|[\u3002\uff01\uff1f]")


@dataclass(frozen=True)
class Cut:
    """A text in pieces.

    Attributes:
        texts: the pieces; joined, they are the text.
        inside: of the boundaries, by the number of the piece behind, those that fall inside a token
            of the text as a whole.
    """

    texts: tuple[str, ...]
    inside: tuple[int, ...]


def by_paragraph(text: str, tokenizer: "PreTrainedTokenizerBase") -> Cut:
    """Cut behind each blank line; blank lines stay with the paragraph before them.

    Args:
        text: with something in it other than space.
        tokenizer: a fast one of transformers, which tells where its tokens stand.

    Raises:
        PICacheError: a blank text, another tokenizer.
    """
    spans = _spans(text, tokenizer)
    behind = [found.end() for found in _PARAGRAPH.finditer(text) if text[: found.start()].strip()]
    return _cut(text, behind, spans)


def by_tokens(text: str, tokenizer: "PreTrainedTokenizerBase", most: int) -> Cut:
    """Cut at the last end of a sentence, or of a line, that leaves `most` tokens at most.

    A sentence ends with a full stop, "!" or "?"; the space behind it begins the next piece, since
    most tokenizers join it with the word that follows. A sentence longer than `most` tokens is cut
    between two of them. Tokens are counted in the text as a whole.

    Args:
        text: with something in it other than space.
        tokenizer: a fast one of transformers, which tells where its tokens stand.
        most: tokens of a piece; a character of several tokens is not cut, and may have more.

    Raises:
        PICacheError: a blank text, another tokenizer, no number of tokens.
    """
    spans = _spans(text, tokenizer)
    ends = [found.end() for found in _SENTENCE.finditer(text)]

    def last_end(begin: int, first: int, last: int) -> int | None:
        place = bisect_right(ends, spans[last][0]) - 1
        return ends[place] if place >= 0 and ends[place] > begin else None

    return _cut(text, _boundaries(spans, most, last_end), spans)


def by_seams(text: str, tokenizer: "PreTrainedTokenizerBase", most: int) -> Cut:
    """Cut between tokens, `most` of them in a piece at most, where they stay what they are.

    That is the last place at which the texts on both sides, tokenized by themselves, have the
    tokens of both together, as far as `picache.seams.WINDOW` characters show; where there is none,
    between any two tokens.

    Args:
        text: with something in it other than space.
        tokenizer: a fast one of transformers, which tells where its tokens stand.
        most: tokens of a piece; a character of several tokens is not cut, and may have more.

    Raises:
        PICacheError: a blank text, another tokenizer, no number of tokens.
    """
    spans = _spans(text, tokenizer)
    seams = Seams(tokenizer)

    def last_seam(begin: int, first: int, last: int) -> int | None:
        for token in range(last, first, -1):
            place = spans[token][0]
            before, behind = text[max(begin, place - WINDOW) : place], text[place : place + WINDOW]
            if before and seams.between([ends_of(before), ends_of(behind)]) == (False,):
                return place
        return None

    return _cut(text, _boundaries(spans, most, last_seam), spans)


def _spans(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[tuple[int, int]]:
    """Where each token of the text begins and ends."""
    if not isinstance(text, str) or not text.strip():
        raise PICacheError(f"a text to cut must not be blank, got {text!r}")
    if not getattr(tokenizer, "is_fast", False):
        raise PICacheError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in a text: give a "
            "fast tokenizer of transformers (AutoTokenizer)"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [(start, end) for start, end in found["offset_mapping"]]


def _boundaries(
    spans: Sequence[tuple[int, int]], most: int, choose: Callable[[int, int, int], int | None]
) -> Iterator[int]:
    """Places at which to cut.

    Args:
        spans: of the tokens.
        most: tokens of a piece.
        choose: a place, by where the piece begins, its first token, and the first token that it
            has no room for; None for in front of that.
    """
    most = whole_number("a cut needs a whole number of tokens", most, least=1)
    ends = [end for _, end in spans]
    begin = first = 0
    while first + most < len(spans):
        last = first + most
        place = choose(begin, first, last)
        if place is None:  # in front of the token, or of the character that it is a part of
            whole = [k for k in range(last, first, -1) if spans[k][0] >= ends[k - 1]]
            later = (k for k in range(last, len(spans)) if spans[k][0] >= ends[k - 1])
            token = whole[0] if whole else next(later, None)
            if token is None:
                return
            place = spans[token][0]
        yield place
        begin, first = place, bisect_right(ends, place)


def _cut(text: str, places: Iterable[int], spans: Sequence[tuple[int, int]]) -> Cut:
    inner = [place for place in places if 0 < place < len(text)]
    texts = tuple(text[start:end] for start, end in pairwise([0, *inner, len(text)]))
    ends = [end for _, end in spans]

    def inside(place: int) -> bool:
        token = bisect_right(ends, place)  # the first one that ends behind it
        return token < len(spans) and spans[token][0] < place

    return Cut(texts, tuple(n for n, place in enumerate(inner, start=1) if inside(place)))
