"""A question on documents, and the pieces of text that a prompt for it is linked from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from picache.errors import PICacheError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the documents while a template is rendered


@dataclass(frozen=True)
class Problem:
    """A question on documents, with the answers that count as right.

    Args:
        documents: texts, in the order they stand in the prompt; each becomes a chunk.
        question: asked behind the documents.
        answers: any of them is right, the first is the one whose likelihood is measured; none
            where only distances from full prefill are wanted.
        instruction: what stands before the documents.
        lead: how the answer begins, given to the model; what it goes on with is compared.

    Raises:
        PICacheError: no documents, a blank document or answer, or a question, instruction or lead
            that is no text.
    """

    documents: tuple[str, ...]
    question: str
    answers: tuple[str, ...] = ()
    instruction: str = ""
    lead: str = ""

    def __post_init__(self) -> None:
        for name in ("documents", "answers"):
            texts = getattr(self, name)
            if isinstance(texts, str) or not all(isinstance(t, str) and t.strip() for t in texts):
                raise PICacheError(f"{name} must be a tuple of texts, none blank, got {texts!r}")
            object.__setattr__(self, name, tuple(texts))
        if not self.documents:
            raise PICacheError("a Problem needs at least one document")
        for name in ("question", "instruction", "lead"):
            if not isinstance(getattr(self, name), str):
                raise PICacheError(f"{name} must be a text, got {getattr(self, name)!r}")


class Pieces(NamedTuple):
    """A prompt in pieces: the first chunk, an exact prefix; one chunk a document; the query."""

    prefix: str
    documents: tuple[str, ...]
    query: str


def pieces(problem: Problem, tokenizer: "PreTrainedTokenizerBase") -> Pieces:
    """The prompt of `problem` in pieces, by the tokenizer's chat template where it has one.

    Under a template the documents stand inside the user's turn, and the query ends with the
    assistant's turn opened and the lead; a model that can think is told to answer at once
    (``enable_thinking=False``). Without one the texts follow each other as they are. Each ends with
    one newline, behind which most tokenizers begin a token anew, so that the texts linked have the
    tokens of the joined text.

    Raises:
        PICacheError: the template does not render the user's turn as it is written.
    """
    documents = tuple(f"{document}\n" for document in problem.documents)
    instruction = f"{problem.instruction}\n" if problem.instruction else ""
    if not tokenizer.chat_template:
        bos = tokenizer.bos_token or ""
        lead = f" {problem.lead}" if problem.lead else ""
        return Pieces(f"{bos}{instruction}", documents, f"{problem.question}{lead}")
    turn = [{"role": "user", "content": f"{instruction}{_MARK}{problem.question}"}]
    whole = str(
        tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    )
    if whole.count(_MARK) != 1:
        raise PICacheError(
            f"the documents cannot be placed in {problem.question!r}: rendered, the user's turn "
            f"has {whole.count(_MARK)} places for them. Leave U+FFFC out of the instruction and "
            "the question; else the chat template changes what users write, and problems need "
            "tokenizer.chat_template = None"
        )
    before, _, behind = whole.partition(_MARK)
    return Pieces(before, documents, f"{behind}{problem.lead}")


def answer_ids(problem: Problem, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens by which the first answer of `problem` goes on from its query.

    A space stands between the two, unless the query ends with one or with a new line. Where the
    query's last token would change by what follows, the answer's tokens are those of its text
    alone.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    query = pieces(problem, tokenizer).query
    answer = problem.answers[0]
    if query and not query[-1].isspace():
        answer = f" {answer}"
    alone, whole = ids(query), ids(query + answer)
    goes_on = len(whole) > len(alone) and whole[: len(alone)] == alone
    return whole[len(alone) :] if goes_on else ids(answer)


def check_problems(problems: Sequence[Problem]) -> None:
    """Refuse what is no list of problems.

    Raises:
        PICacheError: an empty list, an entry of another kind, or answers to some of them only.
    """
    if isinstance(problems, Problem) or not len(problems):
        raise PICacheError("problems must be a list of at least one Problem")
    for index, problem in enumerate(problems):
        if not isinstance(problem, Problem):
            raise PICacheError(
                f"problem {index} is a {type(problem).__name__}; expected a "
                "picache.Problem(documents, question, answers)"
            )
        if bool(problem.answers) != bool(problems[0].answers):
            raise PICacheError(
                f"problem {index} has {len(problem.answers)} answers and problem 0 "
                f"{len(problems[0].answers)}: give answers to all problems or to none"
            )
