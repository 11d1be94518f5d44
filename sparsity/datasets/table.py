"""The data sets: where each stands on the hub, and how a row becomes a problem."""

from collections.abc import Callable
from dataclasses import dataclass

from sparsity.datasets.rows import Row
from sparsity.problem import Problem

ASK = r"Please reason step by step, and put your final answer within \boxed{}."


@dataclass(frozen=True)
class DataSet:
    """A data set of the hub.

    Args:
        repository: on the hub.
        split: taken where none is asked for.
        problem: of a row.
        columns: that a row has, for errors.
        subset: of the repository's; None where it has but one.
    """

    repository: str
    split: str
    problem: Callable[[Row], Problem]
    columns: str
    subset: str | None = None


def gsm8k(row: Row) -> Problem:
    """GSM8K (arXiv 2110.14168): the answer stands behind "####" of the solution."""
    _, marked, answer = row["answer"].rpartition("####")
    if not marked:
        raise ValueError(f"no #### in the answer {row['answer']!r}")
    return _asked(row["question"], answer.strip().replace(",", ""))


def math(row: Row) -> Problem:
    """MATH-500 (arXiv 2305.20050) and AIME: the answer is LaTeX, or a number.

    The problem stands in a column "problem", "Problem" or "prompt", by who publishes it.
    """
    for question, answer in (("problem", "answer"), ("Problem", "Answer"), ("prompt", "answer")):
        if question in row:
            return _asked(row[question], str(row[answer]))
    raise KeyError("problem")


def _asked(question: str, answer: str) -> Problem:
    prompt = question if question.endswith(ASK) else f"{question}\n{ASK}"
    return Problem(prompt, (answer,))


DATASETS = {
    "gsm8k": DataSet("openai/gsm8k", "test", gsm8k, "question, answer", subset="main"),
    "math500": DataSet("HuggingFaceH4/MATH-500", "test", math, "problem, answer"),
    "aime": DataSet("HuggingFaceH4/aime_2024", "train", math, "problem, answer"),
}
"""By the name that `load` takes."""
