"""Seams: where the texts of a prompt meet, and the tokens there.

A tokenizer may join the end of a text with the beginning of the next, or split either otherwise
than at the end of all text. The tokens of texts one by one are then not those of the joined text.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from picache.errors import PICacheError
from picache.text_ids import ids_of_text

WINDOW = 32
"""Characters on both sides of a seam that are looked at: what stands further off is taken not to
change the tokens at the seam."""


def ends_of(text: str) -> tuple[str, str]:
    """What of a text stands near seams: its beginning and its end, `WINDOW` characters each."""
    return text[:WINDOW], text[-WINDOW:]


class Seams:
    """Tells, for one tokenizer, where joined texts have other tokens; a seam is looked at once.

    Args:
        tokenizer: of the model; None where there is none, and no text.
    """

    def __init__(self, tokenizer: Callable[..., Any] | None) -> None:
        self._tokenizer: Any = tokenizer
        self._changes = lru_cache(maxsize=2**14)(self._look)

    def between(self, ends: Sequence[tuple[str, str] | None]) -> tuple[bool | None, ...]:
        """For each place where two texts meet, whether the joined text has other tokens there.

        Args:
            ends: of the texts in prompt order, see `ends_of`; None for what was given as token ids.

        Returns:
            One entry for each pair of neighbours; None where one of them is no text.
        """
        return tuple(
            None if one is None or two is None else self._changes(one[1], two[0])
            for one, two in pairwise(ends)
        )

    def _look(self, before: str, behind: str) -> bool:
        left, right, both = (
            list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (before, behind, before + behind)
        )
        return bool(left + right != both)


def cut_at_seams(texts: Sequence[str], tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """Tokenize the joined texts once, and cut the ids where the texts meet.

    Args:
        texts: in prompt order.
        tokenizer: of the model; one of transformers' fast ones, which tell where a token stands.
        vocab_size: entries of the model's vocabulary.

    Returns:
        The ids of each text. A token that straddles a seam goes to the text in which it begins.
        What the tokenizer adds in front of a text stands in front of each; what it adds behind is
        left out.

    Raises:
        PICacheError: no list of texts, an empty one, one that is left without a token of its own, a
            tokenizer that does not say where its tokens stand.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
        raise PICacheError(f"cut needs a list of texts, none of them empty, got {texts!r}")
    if not texts:
        raise PICacheError("cut needs at least one text")
    whole = "".join(texts)
    joined = ids_of_text(whole, tokenizer, vocab_size, "the joined text")
    if not getattr(tokenizer, "is_fast", False):
        raise PICacheError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in a text: cut needs "
            "a fast tokenizer of transformers (AutoTokenizer), or link the texts one by one"
        )
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    begins = [0, *accumulate(len(text) for text in texts[:-1])]
    pieces: list[list[int]] = [[] for _ in texts]
    for token, (start, _) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        pieces[bisect_right(begins, start) - 1].append(token)
    if empty := [index for index, piece in enumerate(pieces) if not piece]:
        raise PICacheError(
            f"text {empty[0]}, {texts[empty[0]]!r}, lies wholly inside a token that begins before "
            "it: join it with the text before"
        )
    front = ids_of_text("a", tokenizer, vocab_size, "a text")
    own = joined.ids[: joined.lead]  # none, where the text begins with what would be added
    added = front.ids[: front.lead]
    return [[*own, *pieces[0]], *([*added, *piece] for piece in pieces[1:])]
