"""The questions of link_evidence.py, in turns of as many that are linked at once."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from paragraph_questions import TASKS, questions
from transformers import PreTrainedTokenizerBase

from picache import Problem
from picache.datasets.formats import LEAD
from picache.problem import answer_ids, pieces

NEW_TOKENS = 8
"""Tokens of an answer at most; more are not decoded, and what needs more is left out."""
LONGEST = 3000
"""Tokens of a prompt beyond which a question is left out."""
EAGER = 4
"""Every so many turns measure the ways of which no pass is captured."""


class Asked(NamedTuple):
    """A question: of which task, its number there, and the problem."""

    task: str
    number: int
    problem: Problem


class Turn(NamedTuple):
    """Questions that are linked at once, and whether by the eager ways, too."""

    asked: list[Asked]
    eager: bool


def asked_of(
    folder: Path, tokenizer: PreTrainedTokenizerBase, count: int, seed: int, lead: str = LEAD
) -> list[Asked]:
    """The questions of all tasks that fit; `lead` in front of answers that have none of their own.

    Which ones fit does not depend on the lead.
    """

    def fits(problem: Problem) -> bool:
        return (
            asked_tokens(problem, tokenizer) <= LONGEST
            and 0 < len(answer_ids(problem, tokenizer)) <= NEW_TOKENS
            and min(len(text_ids(answer, tokenizer)) for answer in problem.answers) <= NEW_TOKENS
        )

    def led(problem: Problem) -> Problem:
        return replace(problem, lead=lead) if problem.lead == LEAD else problem

    return [
        Asked(task, number, led(problem))
        for task in TASKS
        for number, problem in enumerate(questions(task, folder, count, seed, fits))
    ]


def asked_tokens(problem: Problem, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a problem's documents and of its question."""
    whole = "".join([*pieces(problem, tokenizer).documents, problem.question])
    return len(text_ids(whole, tokenizer))


def turns_of(every: Sequence[Asked], together: int) -> list[Turn]:
    """The questions in turns of as many, whose prompts are about as long; the turns mixed.

    The last turn has some of the questions of the one before, since passes are captured for the
    number of prompts.
    """

    def size(one: Asked) -> tuple[bool, int, int]:
        documents = one.problem.documents
        return one.task == "lookup", len(documents), sum(map(len, documents))

    ordered = sorted(every, key=size)
    starts = [min(i, max(0, len(ordered) - together)) for i in range(0, len(ordered), together)]
    turns = [
        Turn(ordered[start : start + together], index % EAGER == 0)
        for index, start in enumerate(starts)
    ]
    # Steps of the golden ratio: those that come first are spread over all lengths, however many.
    return [turns[i] for i in np.argsort(np.arange(len(turns)) * 0.618034 % 1)]


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text, no special ones added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def with_bos(problem: Problem, tokenizer: PreTrainedTokenizerBase) -> Problem:
    """Each document and the query begin with a BOS that stays in the prompt, as in EPIC's code.

    It is what ``sinks="keep"`` gives where the tokenizer adds a BOS to every text. A model without
    one has its end of text there.
    """
    bos = tokenizer.bos_token or tokenizer.eos_token
    return Problem(
        tuple(f"{bos}{text}" for text in problem.documents),
        f"{bos}{problem.question}",
        problem.answers,
        problem.instruction,
        problem.lead,
    )
