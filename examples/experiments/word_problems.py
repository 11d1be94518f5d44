"""Problems in plain language, solved by chains of lemmas that are used for a while and never again.

Each person has a number of things, told by that of one or two others, in shuffled sentences. The
chain of thought goes from person to person: it repeats what is told of the next one and writes the
number down. A number is needed for the next person and perhaps for one that comes soon after, and
then never again, as the milestone tokens of RaaS are (arXiv 2502.11147, section 3). The sentences
are looked for all over the prompt until the end.
"""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

NAMES = tuple(
    (
        "Adam Alice Amy Anna Ben Bob Carl Clara Daisy Dan David Ella Emma Eric Eva Frank Fred "
        "Grace Helen Henry Iris Jack Jane Jason Jill Jim Joan Joe John Julia Karen Kate Kevin "
        "Kim Larry Laura Lee Leo Lily Linda Lisa Lucy Luke Mark Martin Mary Max Mia Mike "
        "Nancy Nick Nina Oliver Oscar Paul Peter Rachel Ray Robert Rose Ruth Ryan Sam Sara "
        "Scott Simon Sophie Steve Susan Thomas Tim Tom Victor Walter Will"
    ).split()
)
THINGS = tuple("apples books coins cards shells stamps marbles pens stones beads".split())
MOST = 99
"""The largest number that somebody has."""
REACH = 6
"""How many steps back the second number of a sum may have been derived."""
ASKED = "Work it out step by step, one person after the other."


@dataclass(frozen=True)
class WordProblem:
    """A problem and its chain of thought.

    Attributes:
        question: the sentences and what is asked.
        solution: the chain, which ends with the answer.
        answer: the number asked for.
        uses: for each step, the earlier steps whose numbers it needs.
    """

    question: str
    solution: str
    answer: int
    uses: tuple[tuple[int, ...], ...]


def word_problem(rng: random.Random, steps: int) -> WordProblem:
    """A problem whose chain has so many steps, of one person each, 2 at least."""
    people, thing = rng.sample(NAMES, steps), rng.choice(THINGS)
    numbers = [rng.randint(5, 60)]
    told = [f"{people[0]} has {numbers[0]} {thing}."]
    lines = [told[0]]
    uses: list[tuple[int, ...]] = [()]
    for step in range(1, steps):
        person, last, number = people[step], people[step - 1], numbers[-1]
        back = rng.randint(2, REACH)
        before = max(0, step - back)
        small = rng.randint(2, 9)
        ways = []
        if number + small <= MOST:
            ways.append("more")
        if number > small:
            ways.append("fewer")
        if before < step - 1 and number + numbers[before] <= MOST:
            ways += ["together"] * 2
        if before < step - 1 and number > numbers[before]:
            ways += ["without"] * 2
        way = rng.choice(ways)
        if way in ("more", "fewer"):
            found = number + small if way == "more" else number - small
            said = f"{person} has {small} {way} {thing} than {last}."
            sum_ = f"{number} {'+' if way == 'more' else '-'} {small}"
            uses.append((step - 1,))
        else:
            other, theirs = people[before], numbers[before]
            found = number + theirs if way == "together" else number - theirs
            said = {
                "together": f"{person} has as many {thing} as {last} and {other} together.",
                "without": f"{person} has as many {thing} as {last} has more than {other}.",
            }[way]
            sum_ = f"{number} {'+' if way == 'together' else '-'} {theirs}"
            uses.append((step - 1, before))
        numbers.append(found)
        told.append(said)
        lines.append(f"{said} That is {sum_} = {found}. {person} has {found} {thing}.")
    shuffled = rng.sample(told, steps)
    asked = f"How many {thing} does {people[-1]} have? {ASKED}"
    question = " ".join([*shuffled, asked])
    lines.append(f"The answer is {numbers[-1]}.")
    return WordProblem(question, "\n".join(lines), numbers[-1], tuple(uses))


def unseen(seed: int, count: int, steps: tuple[int, int]) -> list[WordProblem]:
    """Problems of a seed that training never draws."""
    rng = random.Random(f"unseen {seed}")
    return [word_problem(rng, rng.randint(*steps)) for _ in range(count)]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """The ids of a question as the model's chat has it, up to where the answer begins."""
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer: of the chat's turns where there is one, else of texts.

    By its name, since what a GGUF file is read to name as the end of text is not the same in all
    releases of transformers.
    """
    return tokenizer.get_vocab().get("<|im_end|>", tokenizer.eos_token_id)


def final_answer(text: str) -> int | None:
    """The number that a chain ends with; None where it gives none."""
    _, found, rest = text.rpartition("The answer is ")
    digits = rest.split(".")[0].strip()
    return int(digits) if found and digits.isdecimal() else None
