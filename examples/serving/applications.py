"""Three applications of several calls each over a shared library: retrieve, read, answer, check.

An application is a generator: it yields the next `Call`, is sent what the model wrote, and returns
its answers. It knows neither the model nor the order in which calls are served.
"""

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from serving.library import Page, Question, asked_back, question, search

PAGES_A_CALL = 4
"""Pages that a call which reads is given."""
MIX = {"lookup": 0.6, "brief": 0.2, "checked": 0.2}
"""Share of each application in a stream."""
MOST_ROUNDS = 3
"""Times that a checked answer is given at most."""


@dataclass(frozen=True)
class Call:
    """One call of the model.

    Args:
        unit: what it is for: "retrieve", "read", "answer" or "check".
        documents: texts in the order of the prompt, each of them a chunk.
        question: behind the documents.
        lead: how the model's answer begins.
        new_tokens: it may write at most.
        likely: documents that the application may well need next, for prewarming.
    """

    unit: str
    documents: tuple[str, ...]
    question: str
    lead: str
    new_tokens: int
    likely: tuple[str, ...] = ()


Steps = Generator[Call, str, list[str]]


@dataclass(frozen=True)
class Task:
    """A run of an application: what is asked, and the seed of what is random in it.

    Args:
        number: which of its stream.
        application: its name.
        questions: one, of a brief several.
        seed: of the order of the pages in its prompts.
    """

    number: int
    application: str
    questions: tuple[Question, ...]
    seed: str

    @property
    def expected(self) -> list[str]:
        """The known facts that are asked for."""
        return [asked.answer for asked in self.questions]


def stream(library: Sequence[Page], count: int, seed: str) -> list[Task]:
    """`count` runs of the applications of `MIX`, each at least once where there is room for all.

    A lookup asks for one fact, a brief for one of each of two to four towns, a checked answer for
    one. Some towns are asked about more often than others (as 1 over their place in the library).
    """
    draw = random.Random(f"stream {seed}")
    popular = [1.0 / (place + 1) for place in range(len(library))]
    names = list(MIX)[:count]
    names += draw.choices(list(MIX), list(MIX.values()), k=count - len(names))
    draw.shuffle(names)
    tasks = []
    for number, name in enumerate(names):
        towns = draw.randint(2, 4) if name == "brief" else 1
        asked = [
            question(page, draw.choice(list(page.facts)))
            for page in draw.choices(library, popular, k=towns)
        ]
        tasks.append(Task(number, name, tuple(asked), f"{seed} {number}"))
    return tasks


def steps(task: Task, library: Sequence[Page]) -> Steps:
    """The application of a task, ready to begin."""
    return _APPLICATIONS[task.application](task, library, random.Random(task.seed))


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer begins with the words expected."""
    return first_words(answer, expected) == expected.lower().split()


def first_words(answer: str, expected: str) -> list[str]:
    """As many words of an answer as were expected, in small letters without punctuation."""
    words = ["".join(filter(str.isalnum, word)) for word in answer.lower().split()]
    return words[: len(expected.split())]


def _lookup(task: Task, library: Sequence[Page], draw: random.Random) -> Steps:
    """One fact: retrieve, answer."""
    (asked,) = task.questions
    found = yield from _retrieve(asked, library, draw)
    return [(yield _ask("answer", asked, found))]


def _brief(task: Task, library: Sequence[Page], draw: random.Random) -> Steps:
    """A fact on each of several towns, and a report on them: retrieve and read for each, answer."""
    notes, kept = [], []
    for asked in task.questions:
        found = yield from _retrieve(asked, library, draw)
        notes.append((yield _ask("read", asked, found, new_tokens=16)))
        kept += [page for page in found if page.town == asked.town]
    towns = list(dict.fromkeys(asked.town for asked in task.questions))
    pages = list({page.town: page for page in kept}.values()) or list(found)
    wanted = f"Write a short report on {' and '.join(towns)}."
    yield Call("answer", _texts(pages), wanted, "", 40)
    return notes


def _checked(task: Task, library: Sequence[Page], draw: random.Random) -> Steps:
    """One fact, asked back: retrieve, then answer and check until the check names the town."""
    (asked,) = task.questions
    found = yield from _retrieve(asked, library, draw)
    for _ in range(MOST_ROUNDS):
        answer = yield _ask("answer", asked, found)
        said = " ".join(answer.split()[: len(asked.answer.split())]).strip(".,") or "nothing"
        if is_right((yield _ask("check", asked_back(asked, said), found)), asked.town):
            break
        draw.shuffle(found)  # the model may see it better where it stands elsewhere
    return [answer]


_APPLICATIONS: dict[str, Callable[[Task, Sequence[Page], random.Random], Steps]] = {
    "lookup": _lookup,
    "brief": _brief,
    "checked": _checked,
}


def _retrieve(
    asked: Question, library: Sequence[Page], draw: random.Random
) -> Generator[Call, str, list[Page]]:
    """Let the model write search words from the contents of the library, and search by them."""
    guess = search(library, asked.text, PAGES_A_CALL)
    wanted = f"Which page answers this question: {asked.text}"
    words = yield Call("retrieve", (contents(library),), wanted, "The page on", 4, _texts(guess))
    found = search(library, f"{asked.text} {words}", PAGES_A_CALL)
    draw.shuffle(found)
    return found


def _ask(unit: str, asked: Question, found: Sequence[Page], new_tokens: int = 6) -> Call:
    texts = _texts(found)
    return Call(unit, texts, asked.text, asked.lead, new_tokens, likely=texts)


def contents(library: Sequence[Page]) -> str:
    """The page that lists all pages."""
    return f"The library has pages on {', '.join(page.town for page in library)}."


def _texts(found: Sequence[Page]) -> tuple[str, ...]:
    return tuple(page.text for page in found)
