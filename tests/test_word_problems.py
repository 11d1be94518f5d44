"""Problems in words: the answer follows from the sentences, and lemmas fade as they shall."""

import random
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiments"))  # scripts

from word_problems import MOST, REACH, final_answer, word_problem

SENTENCE = re.compile(
    r"(?P<who>\w+) has (?:(?P<number>\d+) (?P<thing>\w+)"
    r"|(?P<small>\d+) (?P<way>more|fewer) \w+ than (?P<last>\w+)"
    r"|as many \w+ as (?P<one>\w+) (?:and (?P<two>\w+) together|has more than (?P<less>\w+)))\."
)
problems = st.builds(word_problem, st.randoms(use_true_random=False), st.integers(2, 46))


def by_hand(question):
    """What everybody has, from the sentences in any order, without the chain."""
    told = [match.groupdict() for match in SENTENCE.finditer(question)]
    has = {one["who"]: int(one["number"]) for one in told if one["number"]}
    while len(has) < len(told):
        before = len(has)
        for one in told:
            needs = {one[name] for name in ("last", "one", "two", "less") if one[name]}
            if one["who"] in has or not needs <= has.keys():
                continue
            if one["last"]:
                sign = 1 if one["way"] == "more" else -1
                has[one["who"]] = has[one["last"]] + sign * int(one["small"])
            elif one["two"]:
                has[one["who"]] = has[one["one"]] + has[one["two"]]
            else:
                has[one["who"]] = has[one["one"]] - has[one["less"]]
        assert len(has) > before, "nothing follows any more"
    return has


@given(problem=problems)
def test_the_answer_follows_from_the_sentences(problem):
    has = by_hand(problem.question)
    assert len(has) == len(problem.uses)
    assert all(0 < number <= MOST for number in has.values())
    asked = re.search(r"How many \w+ does (\w+) have", problem.question).group(1)
    assert final_answer(problem.solution) == problem.answer == has[asked]
    for who, number in re.findall(r"(\w+) has (\d+) \w+\.(?:\n|$)", problem.solution):
        assert has[who] == int(number)


@given(problem=problems)
def test_a_number_is_used_soon_and_then_never_again(problem):
    for step, needed in enumerate(problem.uses[1:], 1):
        assert needed[0] == step - 1
        assert all(step - REACH <= earlier < step for earlier in needed)


@given(problem=problems)
def test_the_chain_repeats_every_sentence_once(problem):
    told = [match.group() for match in SENTENCE.finditer(problem.question)]
    lines = problem.solution.splitlines()
    assert sorted(told) == sorted(
        next(sentence for sentence in told if line.startswith(sentence)) for line in lines[:-1]
    )


def test_a_seed_gives_the_same_problem():
    assert word_problem(random.Random(3), 20) == word_problem(random.Random(3), 20)
    assert word_problem(random.Random(3), 20) != word_problem(random.Random(4), 20)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Ann has 3.\nThe answer is 13.", 13),
        ("The answer is 1. Or: The answer is 2.", 2),
        ("The answer is many.", None),
        ("Ann has 3 apples.", None),
        ("The answer is", None),
    ],
)
def test_the_number_that_a_chain_ends_with(text, number):
    assert final_answer(text) == number
