"""Tokens of an answer forced behind full prefill and behind links, and what is told of them."""

import sys
from pathlib import Path

import pytest
import torch

from picache import PIC, Problem
from picache.problem import answer_ids, pieces
from tests.helpers import tiny_model
from tests.picache.test_compare import tokenizer_of

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES / "experiments"), str(EXAMPLES / "benchmarks")]
import answer_begins  # noqa: E402 - the examples are scripts, not a package


def test_full_prefill_is_that_of_the_whole_text_and_links_are_not():
    model = tiny_model("llama")
    tokenizer = tokenizer_of()
    problem = Problem(("the cat sits", "the dog sleeps on"), "who sings", ("cat on",))
    rows = answer_begins.rows_of(PIC(model, tokenizer), problem)
    assert set(rows) == {"full", *answer_begins.ARMS}
    cut, answer = pieces(problem, tokenizer), answer_ids(problem, tokenizer)
    ids = tokenizer("".join([cut.prefix, *cut.documents, cut.query]), add_special_tokens=False)
    whole = torch.tensor([[*ids["input_ids"], *answer]])
    with torch.no_grad():
        chances = model(whole).logits[0].log_softmax(-1)
    expected = [-chances[i - len(answer) - 1, token].item() for i, token in enumerate(answer)]
    assert rows["full"]["nats"] == pytest.approx(expected, abs=1e-4)
    for name in answer_begins.ARMS:
        assert len(rows[name]["nats"]) == len(answer)
        assert rows[name]["nats"] != pytest.approx(expected, abs=1e-4)


def test_the_first_token_and_the_others_are_told_apart():
    def of(first, *later):
        return {"nats": [first, *later], "entropy": first / 2, "likeliest": ":"}

    arms = {"full": of(10.0, 1.0, 3.0)} | dict.fromkeys(answer_begins.ARMS, of(8.0, 2.0, 4.0))
    record = {
        "configuration": {"seed": 0, "model": "m", "questions": 2},
        "environment": {"hardware": "none", "torch": "2", "transformers": "5"},
        "rows": [{"lead": lead, "arms": arms} for lead in answer_begins.LEADS for _ in range(3)],
    }
    record["summary"] = answer_begins.summary(record)
    for row in record["summary"]:
        away = row["arm"] != "full"
        assert row["first"] == [-2.0 * away] * 3
        assert row["later"] == [1.0 * away] * 3
        assert row["all"] == [0.0] * 3
        assert row["likeliest"] == "':' in 3 of 3"
    table = answer_begins.table(record)
    assert (
        "| 8.0 | 4.0 | ':' in 3 of 3 | -2.00 (-2.00 to -2.00) | +1.00 (+1.00 to +1.00) |" in table
    )
