"""The two tasks of the reference model, as seeded generators of templated English.

*Lookup*: documents of facts about towns, then cloze questions. Every document of a problem states
the same relations, and many facts say "It" or "The town" instead of the name, so that a fact means
something only inside its own document.

*Reasoning*: definitions of variables, then a chain of thought that derives each value modulo ten
from earlier ones. A derived value is a milestone: it is used within the next lines and then never
again, while the definitions in the prompt are read one after the other until the end.

Words are separated by single spaces: one word, one token.
"""

import random
from dataclasses import dataclass

TOWNS = tuple(
    head + tail
    for head in (("Ar Bel Cor Dun El Far Gal Hal Ister Jor Kel Lor Mar Nor Or Pel").split())
    for tail in ("vale mont ford wick stead haven bridge crest").split()
)
RELATIONS = tuple(
    (
        "exports borders celebrates builds guards imports paints forbids admires repairs "
        "rents hides teaches trades measures remembers"
    ).split()
)
NOUNS = tuple(
    (
        "amber anchors apples baskets bells boats books bottles bridges candles carpets "
        "chairs clocks cloth coins cups doors drums feathers flags flutes forests gardens "
        "gates glass hammers harbours hats helmets horses houses jewels kettles keys kites "
        "ladders lamps lanterns maps marble mirrors needles ovens pearls pipes plates ponds "
        "poems rivers roads ropes roses ships shoes songs spices statues stones tables tents "
        "towers trains wells wheels windows"
    ).split()
)
VARIABLES = tuple(
    f"{letter}{digit}" for letter in "abcdefghijklmnopqrstuvwxyz" for digit in range(10)
)
DIGITS = tuple("0123456789")
GLUE = tuple(
    (
        "Document : . ; = + - so It The town Questions Question Answer Definitions Read the "
        "documents and complete questions Work out every value modulo ten"
    ).split()
)
PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
VOCABULARY = tuple(
    dict.fromkeys((PAD, BOS, EOS, UNK, *GLUE, *DIGITS, *VARIABLES, *TOWNS, *RELATIONS, *NOUNS))
)

LOOKUP_SYSTEM = f"{BOS} Read the documents and complete the questions ."
LOOKUP_OPENING = "Questions :"
REASONING_SYSTEM = f"{BOS} Work out every value modulo ten ."


@dataclass(frozen=True)
class LookupProblem:
    """`documents` are independent texts; `questions` pairs a cloze question with its answer."""

    documents: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]

    def prompt(self) -> str:
        """The whole prompt that asks the first question."""
        return " ".join([LOOKUP_SYSTEM, *self.documents, self.query()])

    def query(self) -> str:
        """The last part of the prompt: the first question, asked as a sentence to complete."""
        return f"{LOOKUP_OPENING} {self.questions[0][0]}"


def cut(documents: tuple[str, ...], tokens: int) -> list[str]:
    """The documents' text in pieces of so many tokens, wherever they fall."""
    words = " ".join(documents).split()  # one word, one token
    return [" ".join(words[i : i + tokens]) for i in range(0, len(words), tokens)]


@dataclass(frozen=True)
class ReasoningProblem:
    """`prompt` ends where the chain of thought begins; `solution` ends with the answer."""

    prompt: str
    solution: str
    answer: str


def lookup_problem(rng: random.Random, documents: int = 8, facts: int = 6) -> LookupProblem:
    """`documents` towns with `facts` facts each, and one question for every fact, shuffled."""
    relations = rng.sample(RELATIONS, facts)
    texts, questions = [], []
    for town in rng.sample(TOWNS, documents):
        words = ["Document", ":", town, "."]
        for relation in rng.sample(relations, facts):
            value = rng.choice(NOUNS)
            draw = rng.random()
            subject = town if draw < 0.4 else "It" if draw < 0.7 else "The town"
            words += [*subject.split(), relation, value, "."]
            questions.append((f"{town} {relation}", value))
        texts.append(" ".join(words))
    rng.shuffle(questions)
    return LookupProblem(tuple(texts), tuple(questions))


def reasoning_problem(rng: random.Random, steps: int = 40) -> ReasoningProblem:
    """`steps` variables in alphabetical order: two digits, then sums modulo ten.

    One operand is one of the last three variables, the other lies further back, at a distance
    that falls off exponentially (mean about eight lines).
    """
    first = rng.randrange(len(VARIABLES))
    names = [VARIABLES[(first + i) % len(VARIABLES)] for i in range(steps)]
    values: list[int] = []
    definitions, lines = [], []
    for i, name in enumerate(names):
        if i < 2:
            value = rng.randrange(10)
            definitions.append(f"{name} = {value} ;")
            lines.append(f"{name} = {value} so {name} {value} ;")
        else:
            near = i - rng.randint(1, min(3, i))
            far = i - 1 - min(int(rng.expovariate(0.125)), i - 1)
            left, right = (near, far) if rng.random() < 0.5 else (far, near)
            a, b = values[left], values[right]
            value = (a + b) % 10
            definitions.append(f"{name} = {names[left]} + {names[right]} ;")
            lines.append(f"{name} = {names[left]} {a} + {names[right]} {b} so {name} {value} ;")
        values.append(value)
    prompt = f"{REASONING_SYSTEM} Definitions : {' '.join(definitions)} Question : {names[-1]} ;"
    solution = f"{' '.join(lines)} Answer : {values[-1]} . {EOS}"
    return ReasoningProblem(prompt, solution, str(values[-1]))


def final_answer(text: str) -> str | None:
    """The word after the last ``Answer :`` of a decoded chain of thought, or None."""
    _, found, tail = text.rpartition("Answer :")
    words = tail.split()
    return words[0] if found and words else None
