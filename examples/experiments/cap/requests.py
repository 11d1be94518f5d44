"""What is served: passages, a question, and the sentence of the passages that answers it.

All of an exact number of tokens, so that what is held at a context is exact. Texts are paragraphs
of XQuAD (English). Behind the question comes the sentence in which the data set's answer stands:
its beginning as a part of the prompt; what is forced is a window of tokens that holds the answer.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from picache import Problem
from picache.problem import pieces

Ids = tuple[int, ...]

INSTRUCTION = "Read the passages. Answer the question with the sentence that says it."
LEAD = "The passages say:"
SHORTEST = 8
"""Tokens of the shortest piece that a passage is cut to."""
PIECE = 128
"""Tokens of a passage of random ids."""


@dataclass(frozen=True)
class Request:
    """Pieces of one prompt, and what is forced behind it.

    Attributes:
        lead: ids in front of the passages: the template and the instruction.
        passages: ids of each.
        query: ids behind the passages, with the beginning of the sentence that answers.
        answer: ids that follow the query: those that are forced.
    """

    lead: Ids
    passages: tuple[Ids, ...]
    query: Ids
    answer: Ids

    @property
    def before_query(self) -> Ids:
        """The ids of all that stands in front of the query."""
        return (*self.lead, *(token for passage in self.passages for token in passage))

    @property
    def prompt(self) -> Ids:
        return (*self.before_query, *self.query)

    @property
    def context(self) -> int:
        """Tokens of the prompt and of the answer."""
        return len(self.prompt) + len(self.answer)


def asked(
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    contexts: dict[int, int],
    answer: int,
    seed: int,
) -> dict[int, list[Request]]:
    """Requests by context, those of one context each on another question.

    Args:
        tokenizer: of the model.
        folder: with `xquad_en/xquad.en.json`.
        contexts: how many requests of each number of tokens, answer included.
        answer: tokens that are forced.
        seed: of which questions, and of the passages beside theirs.

    Raises:
        SystemExit: the file is not there, or has too few questions.
    """
    file = folder / "xquad_en" / "xquad.en.json"
    if not file.exists():
        raise SystemExit(
            f"--data {folder}: there is no {file}, the file of that name in XQuAD's repository"
        )
    articles = json.loads(file.read_text())["data"]
    paragraphs = [p["context"] for article in articles for p in article["paragraphs"]]
    found: dict[int, list[Request]] = {context: [] for context in contexts}
    for context, count in contexts.items():
        draw = random.Random(f"{seed} {context}")  # more requests have the same ones in front
        questions = _questions(articles, draw)
        while len(found[context]) < count:
            one = next(questions, None)
            if one is None:
                raise SystemExit(f"{file} has too few questions of {context} tokens: ask for fewer")
            request = _request(tokenizer, one, paragraphs, context, answer, draw)
            found[context] += [request] if request is not None else []
    return found


def random_requests(
    vocabulary: int, contexts: dict[int, int], answer: int, seed: int
) -> dict[int, list[Request]]:
    """Requests of random ids, for models of random weights: 16 in front, 48 of a query."""
    found: dict[int, list[Request]] = {}
    for context, count in contexts.items():
        draw = random.Random(f"{seed} {context}")

        def ids(tokens: int, draw: random.Random = draw) -> Ids:
            return tuple(draw.randrange(3, vocabulary) for _ in range(tokens))

        left = context - answer - 64
        if left < SHORTEST:
            raise SystemExit(
                f"a context of {context} tokens is too short for an answer of {answer}"
            )
        size = max(PIECE, context // 16)
        sizes = [size] * (left // size) + ([left % size] if left % size else [])
        found[context] = [
            Request(ids(16), tuple(map(ids, sizes)), ids(48), ids(answer)) for _ in range(count)
        ]
    return found


class Asked(NamedTuple):
    """A question, and where it is answered.

    Attributes:
        paragraph: that answers it.
        question: as the data set has it.
        sentence: of the paragraph, the one that the answer stands in.
        begin: character of the sentence that the answer begins with.
        end: the one behind it.
    """

    paragraph: str
    question: str
    sentence: str
    begin: int
    end: int


def _questions(articles: list[dict], draw: random.Random) -> Iterator[Asked]:
    """One question a paragraph."""
    every = [p for article in articles for p in article["paragraphs"]]
    for paragraph in draw.sample(every, len(every)):
        text, question = paragraph["context"], draw.choice(paragraph["qas"])
        at = question["answers"][0]["answer_start"]
        behind = at + len(question["answers"][0]["text"])
        begin = text.rfind(". ", 0, at) + 2 if ". " in text[:at] else 0
        end = text.find(". ", behind)
        sentence = text[begin:] if end < 0 else text[begin : end + 1]
        yield Asked(text, question["question"], sentence, at - begin, behind - begin)


def window(offsets: Sequence[tuple[int, int]], begin: int, end: int, size: int) -> int | None:
    """The first of `size` tokens that hold the characters from begin to before end.

    They end with the last token of the answer, or are the first ones where that is near the front.

    Args:
        offsets: begin and end of each token, in characters.
        begin: the answer's first character.
        end: the character behind its last.
        size: tokens.

    Returns:
        Its index, or None where the answer is longer than that or the text shorter.
    """
    inside = [place for place, (one, other) in enumerate(offsets) if one < end and other > begin]
    if len(offsets) < size or not inside:
        return None
    first = max(0, inside[-1] + 1 - size)
    return first if first <= inside[0] else None


def _request(
    tokenizer: PreTrainedTokenizerBase,
    one: Asked,
    paragraphs: list[str],
    context: int,
    answer: int,
    draw: random.Random,
) -> Request | None:
    """The request, or None where its own passage does not fit, or the answer not the window."""
    own = one.paragraph
    problem = Problem((own,), one.question, (one.sentence,), INSTRUCTION, LEAD)
    cut = pieces(problem, tokenizer)

    def ids(text: str) -> Ids:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    told = tokenizer(f" {one.sentence}", add_special_tokens=False, return_offsets_mapping=True)
    first = window(told["offset_mapping"], one.begin + 1, one.end + 1, answer)
    if first is None:
        return None
    said = tuple(told["input_ids"])
    lead, query = ids(cut.prefix), (*ids(cut.query), *said[:first])
    forced = said[first : first + answer]
    passages = [ids(cut.documents[0])]
    left = context - len(lead) - len(query) - answer - len(passages[0])
    if left < SHORTEST:
        return None
    for text in draw.sample(paragraphs, len(paragraphs)):
        if text == own:
            continue
        more = ids(f"{text}\n")
        if len(more) >= left:
            more = more[:left]
        elif left - len(more) < SHORTEST:  # what is left is enough for another
            more = more[: left - SHORTEST]
        passages.insert(draw.randrange(len(passages) + 1), more)
        left -= len(more)
        if left == 0:
            return Request(lead, tuple(passages), query, forced)
    return None
