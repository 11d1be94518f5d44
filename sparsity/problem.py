"""A problem with its right answers, and how an answer is found in a text and held against them."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsity.arguments import described
from sparsity.errors import SparsityError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAID = re.compile(r"####|\banswer\s*(?:is\b\s*:?|:)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:\.\d+)?|\.\d+)")
_WORD = re.compile(r"((?<![\w)}\]])-)?\\?(\d+(?:\.\d+)?|[^\W_]+|[+*/^=<>])")  # with its sign
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_ARTICLES = frozenset({"a", "an", "the"})


@dataclass(frozen=True)
class Problem:
    """A question to decode an answer to, with the answers that count as right.

    Args:
        prompt: what the model is asked; where the tokenizer has a chat template, the user's turn.
        answers: any of them is right; none where only distances from dense are wanted.
        continuation: the text behind the prompt that every arm is forced along, such as a chain of
            thought, as the model would write it (where there is no template, the space that parts
            it from the prompt included); None for what dense decodes.

    Raises:
        SparsityError: a prompt, an answer or a continuation that is empty or no text.
    """

    prompt: str
    answers: tuple[str, ...] = ()
    continuation: str | None = None

    def __post_init__(self) -> None:
        answers = self.answers
        listed = isinstance(answers, list | tuple)
        if not listed or not all(isinstance(t, str) and t for t in answers):
            raise SparsityError(
                f"answers must be a tuple of texts, none empty, got {described(answers)}"
            )
        object.__setattr__(self, "answers", tuple(answers))
        texts = {"prompt": self.prompt}
        if self.continuation is not None:
            texts["continuation"] = self.continuation
        for name, text in texts.items():
            if not isinstance(text, str) or not text:
                raise SparsityError(f"{name} must be a text, not empty, got {described(text)}")


def prompt_ids(problem: Problem, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of the prompt: by the chat template, the assistant's turn opened, if there is one.

    Without a template the prompt stands as it is, with the special tokens that the tokenizer puts
    around a text.
    """
    if not tokenizer.chat_template:
        return list(tokenizer(problem.prompt)["input_ids"])
    turn = [{"role": "user", "content": problem.prompt}]
    whole = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(str(whole), add_special_tokens=False)["input_ids"])


def final_answer(text: str) -> str:
    r"""The part of a text that says the answer, as chains of thought write it.

    What stands in the last ``\boxed{...}`` (MATH); else the rest of the line behind the last
    "####" (GSM8K), "answer is" or "answer:"; else the whole text.
    """
    begun = text.rfind(r"\boxed{")
    if begun >= 0:
        start = begun + len(r"\boxed{")
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[start:place].strip()
    marks = list(_SAID.finditer(text))
    if marks:
        behind = text[marks[-1].end() :].strip()
        return behind.splitlines()[0].strip() if behind else ""
    return text.strip()


def is_right(said: str, answer: str) -> float:
    """1 where what was said is the answer, else 0.

    An answer that is a number is held against the last number said: "so 3 + 4 = 7 apples" says 7.
    Of any other, what was said must begin with its words, case, punctuation and articles aside,
    signs not: the model may go on, so that "x + 1" says x.
    """
    number = _only_number(answer)
    if number is not None:
        found = _NUMBER.findall(_THOUSANDS.sub("", said))
        return float(bool(found) and float(found[-1]) == number)
    words, expected = _words(said, answer)
    if not expected:  # an answer without a word, such as "?"
        return float(said.strip() == answer.strip())
    return float(words[: len(expected)] == expected)


def overlap(said: str, answer: str) -> float:
    """Token F1 of SQuAD: overlap of the words of what was said with those of the answer."""
    words, expected = _words(said, answer)
    if not expected:
        return is_right(said, answer)
    both = (Counter(words) & Counter(expected)).total()
    return 2.0 * both / (len(words) + len(expected)) if both else 0.0


def _only_number(text: str) -> float | None:
    """The number that a text is, a currency or percent sign aside; None for any other text."""
    plain = _THOUSANDS.sub("", text.strip().strip("$%€£ "))
    return float(plain) if _NUMBER.fullmatch(plain) else None


def _words(said: str, answer: str) -> tuple[list[str], list[str]]:
    """The words of both in small letters, without articles, unless the answer is but articles."""
    both = [
        [sign + word for sign, word in _WORD.findall(_THOUSANDS.sub("", text.lower()))]
        for text in (said, answer)
    ]
    if set(both[1]) - _ARTICLES:
        both = [[word for word in words if word not in _ARTICLES] for words in both]
    return both[0], both[1]
