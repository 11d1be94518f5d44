"""Summing up link_evidence.py: tasks count alike; arms are chosen on one half of the questions."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors

from picache import PIC, LegoLink, Problem
from picache.datasets.formats import LEAD
from picache.problem import pieces
from tests.helpers import tiny_model
from tests.picache.test_compare import tokenizer_of

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES / "experiments"), str(EXAMPLES / "benchmarks")]
import link_evidence  # noqa: E402 - the examples are scripts, not a package
import link_turns  # noqa: E402
import link_ways  # noqa: E402
import paragraph_questions  # noqa: E402
from link_evidence_pages import beside, draw, tables, two_leads  # noqa: E402
from link_evidence_summary import Sample, summary  # noqa: E402
from link_ways import BOS_KEPT, ways  # noqa: E402

WAYS = ways()
EAGER = {way.label for way in WAYS if way.eager}
LABELS = ["full", f"full, {BOS_KEPT}", *(way.label for way in WAYS)]


def made(kl, shares):
    """A record of made-up numbers: `kl(task, number, label)` and `shares[label]`.

    Eager ways are measured on every other pair of questions.
    """
    questions = [
        {
            "task": task,
            "number": number,
            "prompt_tokens": 100,
            "documents": 10,
            "arms": {
                label: [0.5, 0.1, kl(task, number, label), shares.get(label, 0.05), 0.2]
                for label in LABELS
                if label not in EAGER or number % 4 < 2
            },
        }
        for task, count in (("few", 4), ("many", 12))
        for number in range(count)
    ]
    where = {"hardware": "none", "torch": "2", "transformers": "5"}
    return {
        "configuration": {"model": "none", "tasks": {"lookup": 99}, "seed": 0, "small": False},
        "environment": where,
        "seconds": 1.0,
        "metrics": list(link_evidence.METRICS),
        "first_token_seconds": {way.label: [0.02, 0.01, 0.03] for way in WAYS if way.timed},
        "questions": questions,
    }


def test_every_arm_has_a_name_of_its_own_and_a_twin_that_is_measured():
    assert len(set(LABELS)) == len(LABELS)
    for some in (WAYS, ways(small=True)):
        assert {way.twin for way in some if way.twin} <= {way.label for way in some}
        assert all(
            way.twin for way in some if way.family not in ("naive", "random", "APE, T = S = 0.9")
        )
    assert {way.behind for way in WAYS if way.family == "LegoLink"} == set(link_ways.BEHIND)


def test_a_smaller_run_in_its_order_beside_a_larger_one():
    order = {label: place for place, label in enumerate(LABELS)}
    small, large = (
        summary(made(lambda task, number, label, sign=sign: sign * order[label], {}), WAYS)
        for sign in (1, -1)
    )
    table = beside(small, large)
    asked = [way.label for way in WAYS if not way.eager]  # the others on some questions alone
    assert f"Rank correlation of the {len(asked)} arms: -1.00." in table
    assert table.endswith("Small: 16 questions; none.")
    shown = [line.split(" | ")[0] for line in table.splitlines()[2 : 2 + len(asked)]]
    assert shown == [f"| {label}" for label in asked]


def test_the_same_questions_behind_two_leads():
    run = summary(made(lambda task, number, label: float(LABELS.index(label)), {}), WAYS)
    runs = [run | {"configuration": run["configuration"] | {"lead": lead}} for lead in ("a", "a:")]
    table = two_leads(*runs)
    assert table.startswith('| arm | KL behind "a" | KL behind "a:" |')
    assert table.endswith("arms: 1.00.")


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
    lucky, good = "ProphetKV 15 %", "LegoLink 16"

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
    assert found[0.05, "any"]["kl_minus_twin"][0] == pytest.approx(-0.8)
    assert found[0.0, "any"]["family"] == "naive"


def test_an_arm_of_a_part_of_the_questions_is_chosen_among_those_of_that_part():
    """CacheBlend is measured on the easy questions alone, where all do well."""
    blend, good = "CacheBlend 15 %", "LegoLink 4"

    def kl(task, number, label):
        easy = 0.0 if number % 4 < 2 else 1.0
        return {"naive": 1.0, blend: 0.6, good: 0.5}.get(label, 0.9) + easy

    shares = {"naive": 0.02, blend: 0.15, good: 0.1}
    summed = summary(made(kl, shares), WAYS)
    found = {(row["budget"], row["among"]): row for row in summed["best"]}
    assert found[0.15, "any"]["arm"] == good
    assert found[0.15, "any"]["kl"][0] == pytest.approx(1.0)
    assert found[0.15, "CacheBlend"]["kl"][0] == pytest.approx(0.6)
    assert found[0.15, "CacheBlend"]["kl_minus_naive"][0] == pytest.approx(-0.4)
    assert found[0.15, "CacheBlend"]["kl_minus_twin"][0] == pytest.approx(-0.3)
    counts = {row["arm"]: row["questions"] for row in summed["rows"] if row["task"] == "all"}
    assert (counts[blend], counts[good]) == (8, 16)


def test_arms_whose_prompts_have_other_tokens_are_not_chosen():
    best = summary(made(lambda t, n, label: float(BOS_KEPT not in label), {}), WAYS)["best"]
    assert all(row["behind"] != BOS_KEPT for row in best)


def test_the_time_to_the_first_token_is_that_of_the_method_behind_anything():
    summed = summary(made(lambda *_: 0.1, {}), WAYS)
    rows = {row["arm"]: row for row in summed["rows"]}
    for label in ("LegoLink 4", "LegoLink 4, 4 dummies", "APE, T = S = 0.9, the system prompt"):
        assert rows[label]["first_token_seconds"] == 0.02


def test_turns_are_of_one_size_and_leave_nothing_out():
    rng = random.Random(0)
    every = [
        link_turns.Asked(task, number, Problem(("a",) * rng.randint(1, 20), "b", ("c",)))
        for task in ("lookup", "XQuAD")
        for number in range(21)
    ]
    turns = link_turns.turns_of(every, 8)
    assert [len(turn.asked) for turn in turns] == [8] * 6
    assert {one[:2] for turn in turns for one in turn.asked} == {one[:2] for one in every}
    assert sum(turn.eager for turn in turns) == 2
    for turn in turns:
        documents = [len(one.problem.documents) for one in turn.asked]
        mixed = len({one.task for one in turn.asked}) > 1
        assert mixed or max(documents) - min(documents) <= 12
    assert link_turns.turns_of(every, 8) == turns
    assert [len(turn.asked) for turn in link_turns.turns_of(every[:3], 8)] == [3]


def test_a_lead_stands_in_front_of_answers_that_have_none_of_their_own(monkeypatch):
    plain = Problem(("the cat sits",), "who sits", ("cat",), lead=LEAD)
    own = Problem(("the cat sits",), "who sits", ("cat",), lead="on the mat sits")
    monkeypatch.setattr(link_turns, "questions", lambda *_: [plain, own])
    asked = link_turns.asked_of(Path(), tokenizer_of(), 2, 0, "So:")
    assert [one.problem.lead for one in asked[:2]] == ["So:", own.lead]
    assert [one.problem for one in link_turns.asked_of(Path(), tokenizer_of(), 2, 0)[:2]] == [
        plain,
        own,
    ]


def test_a_kept_bos_is_that_of_a_pic_that_keeps_it():
    tokenizer = tokenizer_of()
    problem = Problem(("the cat sits", "the dog sleeps"), "who sits", ("cat",), "who sings")
    kept = pieces(link_turns.with_bos(problem, tokenizer), tokenizer)
    model = tiny_model("llama")
    texts = PIC(model, tokenizer, flops_per_byte=None)
    ours = texts.link([texts.compile(one) for one in kept[:1] + kept[1]], kept.query, LegoLink(2))
    adding = tokenizer_of()
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", None, [("<s>", 0)]
    )
    pic = PIC(model, adding, sinks="keep", flops_per_byte=None)
    plain = pieces(problem, adding)
    theirs = pic.link([pic.compile(one) for one in plain[:1] + plain[1]], plain.query, LegoLink(2))
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.logits, theirs.logits)


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
