"""Summing up link_evidence.py: tasks count alike; arms are chosen on one half of the questions."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES / "experiments"), str(EXAMPLES / "benchmarks")]
import link_evidence  # noqa: E402 - the examples are scripts, not a package
import paragraph_questions  # noqa: E402
from link_evidence_summary import Sample, draw, summary, tables  # noqa: E402

WAYS = link_evidence.ways()
LABELS = ["full", *(way.label for way in WAYS)]


def made(kl, shares):
    """A record of made-up numbers: `kl(task, number, label)` and `shares[label]`."""
    questions = [
        {
            "task": task,
            "number": number,
            "prompt_tokens": 100,
            "documents": 10,
            "arms": {
                label: [0.5, 0.1, kl(task, number, label), shares.get(label, 0.05), 0.2]
                for label in LABELS
            },
        }
        for task, count in (("few", 4), ("many", 12))
        for number in range(count)
    ]
    where = {"hardware": "none", "torch": "2", "transformers": "5"}
    return {
        "configuration": {"model": "none", "seed": 0, "small": False},
        "environment": where,
        "seconds": 1.0,
        "metrics": list(link_evidence.METRICS),
        "questions": questions,
    }


def test_every_arm_has_a_name_of_its_own_and_a_twin_that_is_measured():
    assert len(set(LABELS)) == len(LABELS)
    assert {way.twin for way in WAYS if way.twin} <= set(LABELS)
    assert all(
        way.twin for way in WAYS if way.family not in ("naive", "random", "APE, T = S = 0.9")
    )


def test_tasks_count_alike():
    sample = Sample(["few"] * 2 + ["many"] * 8, seed=0)
    values = np.array([1.0] * 2 + [3.0] * 8)
    assert sample.mean(values) == pytest.approx(2.0)
    assert sample.interval(values) == pytest.approx([2.0, 2.0, 2.0])


def test_intervals_are_those_of_the_tasks_own_questions():
    rng = np.random.default_rng(0)
    few, many = rng.normal(0, 1, 40), rng.normal(0, 1, 400)
    sample = Sample(["few"] * 40 + ["many"] * 400, seed=0)
    _, low, high = sample.interval(np.concatenate([few, many]))
    error = np.hypot(few.std() / 40**0.5, many.std() / 400**0.5) / 2
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_the_best_is_chosen_on_one_half_and_reported_on_the_other():
    """One arm is best on even questions and worst on odd ones."""
    lucky, good = "ProphetKV 15 %", "LegoLink 8"

    def kl(task, number, label):
        if label == lucky:
            return 0.1 if number % 2 == 0 else 9.0
        return 0.2 if label == good else 1.0

    shares = {"naive": 0.02, lucky: 0.15, good: 0.06}
    record = made(kl, shares)
    found = {(row["budget"], row["among"]): row for row in summary(record, WAYS)["best"]}
    assert found[0.15, "any"]["arm"] == lucky
    assert found[0.15, "any"]["kl"][0] == pytest.approx(9.0)
    assert found[0.15, "any"]["chosen_on"] == pytest.approx(0.1)
    assert found[0.05, "any"]["arm"] == good
    assert found[0.05, "any"]["minus_twin"][0] == pytest.approx(-0.8)
    assert found[0.02, "any"]["recomputed"] <= 0.02 * 1.05 + 1e-9 or (0.02, "any") not in found


def test_a_record_of_some_of_the_questions_is_summed_up(tmp_path):
    draws = random.Random(0)
    record = made(lambda *_: draws.random(), {})
    summed = summary(record, WAYS)
    json.dumps(summed)
    assert {row["task"] for row in summed["rows"]} == {"all", "few", "many"}
    assert "LegoLink 4, 4 dummies" in tables(summed)
    draw(summed, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("task", paragraph_questions.TASKS)
def test_the_answers_to_a_task_stand_in_its_paragraphs(task):
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "musique").exists():
        pytest.skip(f"the data sets' files are not in {folder}")
    problems = paragraph_questions.questions(task, folder, 20, 0, lambda problem: True)
    again = paragraph_questions.questions(task, folder, 20, 0, lambda problem: True)
    assert problems == again
    assert len(problems) == 20
    assert all(len(set(problem.documents)) == len(problem.documents) for problem in problems)
    assert all(10 <= len(problem.documents) <= 20 for problem in problems)
    inside = [
        any(answer in text for answer in problem.answers for text in problem.documents)
        for problem in problems
    ]
    # HotpotQA asks for a yes or a no, too, and Natural Questions knows answers in other words.
    assert sum(inside) >= 15
