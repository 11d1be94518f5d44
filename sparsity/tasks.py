"""Texts and problems in token ids, and which of them are worked on together."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsity.arguments import described
from sparsity.errors import SparsityError
from sparsity.problem import Problem, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Task(NamedTuple):
    """One text or problem in token ids.

    Attributes:
        prompt: fed at once.
        target: fed one by one; None for what dense decodes.
        most: how many tokens are decoded; 0 for none.
        answers: that are right.
    """

    prompt: list[int]
    target: list[int] | None
    most: int = 0
    answers: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """How many tokens come behind the prompt, at most."""
        return max(len(self.target or ()), self.most)

    def of_batch(self, steps: int) -> str:
        """For an error: what to do about a batch of more `steps` than the task has of its own."""
        if steps == self.steps:
            return ""
        return f" ({self.steps} of its own: a smaller batch_size leaves it with these)"


def tasks_of(
    given: Sequence[str] | Sequence[Problem],
    tokenizer: "PreTrainedTokenizerBase",
    prompt_tokens: int,
    new_tokens: int,
) -> tuple[str, list[Task]]:
    """What the numbers are of, "text" or "problem", and each of them in token ids.

    Raises:
        SparsityError: nothing given, texts among problems, a text without two tokens behind its
            prompt, answers to some problems only.
    """
    if not isinstance(given, list | tuple) or not given:
        raise SparsityError(
            f"texts_or_problems is {described(given)}: expected a list of at least one text or "
            "sparsity.Problem"
        )
    kind, unit = (Problem, "problem") if isinstance(given[0], Problem) else (str, "text")
    tasks = []
    for index, one in enumerate(given):
        if not isinstance(one, kind):
            raise SparsityError(
                f"{unit} {index} is {described(one)}: expected texts only or Problems only, each "
                "on its own, without batches (batch_size makes them)"
            )
        if isinstance(one, Problem):
            if bool(one.answers) != bool(given[0].answers):
                raise SparsityError(
                    f"problem {index} has {len(one.answers)} answers and problem 0 "
                    f"{len(given[0].answers)}: give answers to all problems or to none"
                )
            tasks.append(_of_problem(one, tokenizer, new_tokens))
            continue
        ids = list(tokenizer(one)["input_ids"])
        if len(ids) < prompt_tokens + 2:
            raise SparsityError(
                f"text {index} has {len(ids)} tokens, fewer than prompt_tokens + 2 = "
                f"{prompt_tokens + 2}: give longer texts or a smaller prompt_tokens"
            )
        tasks.append(Task(ids[:prompt_tokens], ids[prompt_tokens:]))
    return unit, tasks


def _of_problem(problem: Problem, tokenizer: Any, new_tokens: int) -> Task:
    target = None
    if problem.continuation is not None:
        target = list(tokenizer(problem.continuation, add_special_tokens=False)["input_ids"])
    most = new_tokens if problem.answers or target is None else 0
    return Task(prompt_ids(problem, tokenizer), target, most, problem.answers)


def batches_of(tasks: Sequence[Task], batch_size: int) -> list[list[int]]:
    """The numbers of the tasks, those of like length together, `batch_size` in a batch at most.

    Those with a target and those without are not mixed: what dense does with them differs.
    """

    def size(index: int) -> tuple[bool, int, int]:
        task = tasks[index]
        return task.target is None, task.steps, len(task.prompt)

    batches: list[list[int]] = []
    for _, alike in groupby(sorted(range(len(tasks)), key=size), key=lambda i: size(i)[0]):
        group = list(alike)
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return batches


def steps_of(tasks: Sequence[Task], batches: Sequence[Sequence[int]]) -> dict[int, int]:
    """By the number of a task, the steps of its batch, which goes on to its longest."""
    return {index: max(tasks[i].steps for i in batch) for batch in batches for index in batch}


def check_lengths(
    tasks: Sequence[Task], batches: Sequence[Sequence[int]], unit: str, limit: int | None
) -> None:
    """Refuse texts without tokens, and those that need more positions than the model has.

    Args:
        limit: positions of the model; None for any number.

    Raises:
        SparsityError: where that is so.
    """
    steps = steps_of(tasks, batches)
    for index, task in enumerate(tasks):
        for part, ids in (("prompt", task.prompt), ("continuation", task.target)):
            if ids is not None and not ids:
                raise SparsityError(
                    f"the {part} of {unit} {index} has no tokens: give a text that the tokenizer "
                    "makes tokens of"
                )
        count = len(task.prompt) + steps[index]
        if limit is not None and count > limit:
            raise SparsityError(
                f"{unit} {index} needs {count} tokens{task.of_batch(steps[index])} and the model "
                f"has {limit} positions: give shorter {unit}s"
                + (" or fewer new_tokens" if task.most else "")
            )
