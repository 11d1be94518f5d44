"""Problems that a small model can answer only by reading across a chunk: one password a passage.

Questions on the passages themselves are easy once the beginning of the answer is given, since it
stands in the passage word for word. Of several passwords, only the one behind the right name will
do.
"""

import json
import random
from pathlib import Path

from picache import Problem

DATA = Path(__file__).parents[2] / "examples" / "data"
INSTRUCTION = "Read the passages and answer the question."
# Each is one token of SmolLM2's and of most vocabularies.
WORDS = (
    "silver garden window dragon coffee summer yellow castle forest bridge winter orange "
    "mirror planet rocket basket button carpet engine island jacket kitten ladder marble"
).split()


def needles(documents: int = 4, seed: int = 0) -> tuple[Problem, ...]:
    """One question a passage, put to `documents` passages; each of these holds a password.

    Args:
        documents: passages of a problem.
        seed: draws the passwords, and which passages stand together.
    """
    passages = json.loads((DATA / "passages.json").read_text(encoding="utf-8"))["passages"]
    draw = random.Random(seed)
    words = draw.sample(WORDS, len(passages))
    names = [_inside_a_sentence(passage["title"]) for passage in passages]
    texts = [
        _with_sentence(passage["text"], f"The secret password for {name} is {word}.")
        for passage, name, word in zip(passages, names, words, strict=True)
    ]
    problems = []
    for own, (name, word) in enumerate(zip(names, words, strict=True)):
        others = [i for i in range(len(texts)) if i != own]
        places = [own, *draw.sample(others, documents - 1)]
        draw.shuffle(places)
        problems.append(
            Problem(
                tuple(texts[place] for place in places),
                f"What is the secret password for {name}?",
                (word,),
                INSTRUCTION,
                f"The secret password for {name} is",
            )
        )
    return tuple(problems)


def _inside_a_sentence(title: str) -> str:
    return "the " + title.removeprefix("The ") if title.startswith("The ") else title


def _with_sentence(text: str, sentence: str) -> str:
    """`sentence` in the middle of a text, between two of its own."""
    parts = text.split(". ")
    half = len(parts) // 2
    return f"{'. '.join(parts[:half])}. {sentence} {'. '.join(parts[half:])}"
