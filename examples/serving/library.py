"""Pages on invented towns, drawn from a seed, and questions on them whose answers are known."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

TOWNS = (
    "Belford Corvale Dunmore Eastwick Farley Glenholm Harrow Innsby Keldale Lynmouth Marle "
    "Norbury Oakham Penrose Quarndon Ruswick Selby Tarrin Ulverton Venby Wexcombe Yarmoor "
    "Ashdown Brindle"
).split()
GOODS = (
    "bells ropes candles kites lanterns carpets boots clocks violins baskets mirrors saddles "
    "umbrellas knives buttons kettles"
).split()
FOUNDERS = (
    "Ellen Marsh|Tomas Reed|Amara Venn|Jonas Pike|Clara Holt|Edwin Frost|Nadia Crane|Oscar Lund|"
    "Ruth Alder|Simon Birch|Vera Stone|Walter Finch"
).split("|")
RIVERS = "Orne Tamsel Weir Lodden Carrow Sillet Brack Medway Ilse Thrim".split()
MONTHS = "January February March April May June July August September October".split()
BUILDINGS = (
    "mill|lighthouse|chapel|library|theatre|town hall|windmill|railway station|brewery|museum"
).split("|")
ASIDES = (
    "Most visitors come by train and stay for a day or two.",
    "The streets near the market are narrow and paved with stone.",
    "In winter the roads to it are often closed by snow.",
    "The school was built again after a fire and has a garden.",
    "A path along the water leads to the next village in two hours.",
    "Its inn is small, and travellers are advised to write ahead.",
    "There are two bakers, and the older one is said to be better.",
    "The bridge was repaired last year and is open to carts again.",
)
_ASKED = {
    "goods": ("What are the people of {town} known for making?", "The people of {town} make"),
    "founder": ("Who founded {town}?", "{town} was founded by"),
    "river": ("On which river does {town} lie?", "{town} lies on the river"),
    "month": ("In which month is the fair of {town} held?", "The fair of {town} is held in"),
    "building": ("What is the oldest building of {town}?", "The oldest building of {town} is the"),
}
"""How each fact is asked for, and how its answer begins."""
_ASKED_BACK = {
    "goods": ("Which town is known for making {answer}?", "The town known for making {answer} is"),
    "founder": ("Which town was founded by {answer}?", "The town founded by {answer} is"),
    "river": ("Which town lies on the river {answer}?", "The town on the river {answer} is"),
    "month": ("Which town holds its fair in {answer}?", "The town with a fair in {answer} is"),
    "building": (
        "Of which town is the {answer} the oldest building?",
        "The town whose oldest building is the {answer} is",
    ),
}


@dataclass(frozen=True)
class Page:
    """A page of the library: the facts on a town, and the text that tells them."""

    town: str
    facts: dict[str, str]
    text: str

    @cached_property
    def words(self) -> set[str]:
        """What a search finds it by, in small letters."""
        return set(self.text.lower().replace(".", " ").split())


@dataclass(frozen=True)
class Question:
    """Asks for one fact on one town; `lead` begins the answer."""

    town: str
    fact: str
    text: str
    lead: str
    answer: str


def pages(count: int, sentences: int, seed: int) -> list[Page]:
    """`count` pages of five sentences with a fact each and `sentences` without one, shuffled.

    Raises:
        ValueError: more pages than there are names of towns.
    """
    if count > len(TOWNS):
        raise ValueError(f"{count} pages are asked for, and there are {len(TOWNS)} towns")
    draw = random.Random(f"pages {seed}")
    return [_page(town, sentences, draw) for town in draw.sample(TOWNS, count)]


def _page(town: str, sentences: int, draw: random.Random) -> Page:
    facts = {
        "goods": draw.choice(GOODS),
        "founder": draw.choice(FOUNDERS),
        "river": draw.choice(RIVERS),
        "month": draw.choice(MONTHS),
        "building": draw.choice(BUILDINGS),
    }
    told = [
        f"The people of {town} are known for making {facts['goods']}.",
        f"{town} was founded by {facts['founder']}.",
        f"{town} lies on the river {facts['river']}.",
        f"The fair of {town} is held in {facts['month']}.",
        f"The oldest building of {town} is the {facts['building']}.",
        *(draw.choice(ASIDES) for _ in range(sentences)),
    ]
    draw.shuffle(told)
    return Page(town, facts, f"A page on {town}. {' '.join(told)}")


def question(page: Page, fact: str) -> Question:
    """The question for a fact of a page."""
    text, lead = (each.format(town=page.town) for each in _ASKED[fact])
    return Question(page.town, fact, text, lead, page.facts[fact])


def asked_back(asked: Question, answer: str) -> Question:
    """The question that the town of `asked` is the answer to, if `answer` is right."""
    text, lead = (each.format(answer=answer) for each in _ASKED_BACK[asked.fact])
    return Question(asked.town, asked.fact, text, lead, asked.town)


def search(library: Sequence[Page], words: str, count: int) -> list[Page]:
    """The `count` pages that share most words with `words`; of equals the first in the library.

    The name of a town counts more than all other words together.
    """
    wanted = set(words.lower().replace(".", " ").replace("?", " ").replace(",", " ").split())

    def score(page: Page) -> tuple[bool, int]:
        return page.town.lower() in wanted, len(page.words & wanted)

    return sorted(library, key=score, reverse=True)[:count]
