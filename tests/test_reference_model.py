"""The generators of the two tasks, and what the shipped model does with them."""

import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
REFERENCE_MODEL = ROOT / "examples" / "reference_model"
sys.path.insert(0, str(ROOT / "examples" / "experiments"))

from loaded import loaded  # noqa: E402
from reference_tasks import (  # noqa: E402
    VOCABULARY,
    final_answer,
    lookup_problem,
    reasoning_problem,
)
from train_reference_model import answers  # noqa: E402


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 8))
def test_every_question_has_its_answer_in_its_own_document(seed, documents, facts):
    problem = lookup_problem(random.Random(seed), documents, facts)
    assert problem == lookup_problem(random.Random(seed), documents, facts)
    assert len(problem.documents) == documents
    assert len(problem.questions) == documents * facts
    for question, answer in problem.questions:
        town, relation = question.split()
        (own,) = [d for d in problem.documents if d.startswith(f"Document : {town} .")]
        (fact,) = [s.split() for s in own.split(" . ") if relation in s.split()]
        assert fact[fact.index(relation) + 1] == answer
    assert set(problem.prompt().split()) <= set(VOCABULARY)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(3, 120))
def test_a_chain_of_thought_follows_from_its_definitions(seed, steps):
    problem = reasoning_problem(random.Random(seed), steps)
    values = {}
    definitions = problem.prompt.split("Definitions : ")[1].split(" Question")[0]
    for definition in definitions.removesuffix(" ;").split(" ; "):
        name, _, first, *rest = definition.split()
        value = int(first) if first.isdigit() else values[first]
        if rest:
            value += values[rest[1]] if rest[0] == "+" else -values[rest[1]]
        values[name] = value % 10
        assert f"so {name} {values[name]} ;" in problem.solution
    assert final_answer(problem.solution) == problem.answer == str(values[name])
    assert set(f"{problem.prompt} {problem.solution}".split()) <= set(VOCABULARY)


def test_final_answer_of_a_broken_text():
    assert final_answer("no answer here") is None
    assert final_answer("Answer :") is None
    assert final_answer("Answer : 3 Answer : 7 . <eos>") == "7"


@pytest.fixture(scope="module")
def reference():
    return loaded("reference")


def test_the_model_is_small_and_says_how_it_was_made():
    folder = REFERENCE_MODEL
    assert (folder / "model.safetensors").stat().st_size <= 12e6
    record = json.loads((folder / "training.json").read_text())
    assert record["problems"] >= 200
    card = (folder / "README.md").read_text()
    assert record["command"] in card
    assert f"{record['lookup_exact_match']:.3f}" in card
    assert f"{record['reasoning_exact_match']:.3f}" in card


def test_full_attention_answers_lookups(reference):
    """The bar of the model card, on other problems of the same kind."""
    model, tokenizer = reference
    rng = random.Random(7 * 10**9)
    problems = [lookup_problem(rng) for _ in range(100)]
    texts = answers(model, tokenizer, [p.prompt() for p in problems], 1)
    right = [t == p.questions[0][1] for t, p in zip(texts, problems, strict=True)]
    assert sum(right) >= 95
    record = json.loads((REFERENCE_MODEL / "training.json").read_text())
    assert record["lookup_exact_match"] >= 0.95


def test_full_attention_reasons_to_the_end(reference):
    """The bar of the model card, on other chains of the same kind, every line checked."""
    model, tokenizer = reference
    rng = random.Random(8 * 10**9)
    chains = [reasoning_problem(rng) for _ in range(25)]
    assert min(len(c.solution.split()) for c in chains) >= 300
    texts = answers(model, tokenizer, [c.prompt for c in chains], 450)
    assert sum(final_answer(t) == c.answer for t, c in zip(texts, chains, strict=True)) >= 24
    assert sum(t.startswith(c.solution) for t, c in zip(texts, chains, strict=True)) >= 23
    record = json.loads((REFERENCE_MODEL / "training.json").read_text())
    assert record["reasoning_tokens"][0] >= 300
    assert record["reasoning_exact_match"] >= 0.95
