"""Training the reasoning adapter: what is labelled, how it is batched, and what the loss is."""

import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiments"))  # scripts

from train_reasoning_adapter import IGNORE, Problems, loss_of, solved
from word_problems import end_id, final_answer, unseen

from tests.helpers import tiny_model


class Words:
    """A tokenizer whose tokens are bytes, and whose chat is a question between two marks."""

    eos_token_id = 0

    def get_vocab(self):
        return {}

    def apply_chat_template(self, chat, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        return f"<{chat[0]['content']}>"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [*text.encode()]}

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [bytes(int(i) % 256 for i in row if i).decode(errors="replace") for row in rows]


@pytest.mark.parametrize("tokens", [1500, 6000])
def test_the_chain_alone_is_labelled_and_batches_are_bounded(tokens):
    batches = islice(Problems(Words(), (3, 4), tokens, seed=0), 6)
    for ids, labels in batches:
        assert ids.shape == labels.shape
        assert ids.numel() <= tokens
        for row, wanted in zip(ids, labels, strict=True):
            (at,) = (wanted != IGNORE).nonzero(as_tuple=True)
            assert torch.equal(at, torch.arange(at[0], at[-1] + 1))
            assert torch.equal(row[at], wanted[at])
            assert bytes(row[: at[0]].tolist()).endswith(b"one person after the other.>")
            assert wanted[at[-1]] == Words.eos_token_id
            assert final_answer(bytes(wanted[at[:-1]].tolist()).decode()) is not None


def test_a_seed_gives_the_same_batches_and_another_seed_others():
    first, again, other = (
        next(iter(Problems(Words(), (3, 4), 3000, seed)))[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_the_loss_is_the_models_own():
    model = tiny_model("llama", vocab_size=256)
    ids, labels = next(iter(Problems(Words(), (2, 3), 2000, seed=0)))
    short = slice(0, 2)
    expected = model(input_ids=ids[short], labels=labels[short]).loss
    torch.testing.assert_close(loss_of(model, ids[short], labels[short]), expected)


def test_unseen_problems_are_solved_in_batches_of_any_size():
    model = tiny_model("llama", vocab_size=256)
    problems = unseen(0, 3, (2, 3))
    assert problems == unseen(0, 3, (2, 3))
    one = solved(model, Words(), problems, together=1, end=0)
    assert [row["steps"] for row in one] == [len(problem.uses) for problem in problems]
    assert not any(row["right"] for row in one)  # of a model that was taught nothing
    assert len(solved(model, Words(), problems, together=3, end=0)) == 3


def test_an_answer_ends_at_the_token_that_was_taught():
    """The model's own may be another one, or none; what comes behind would be read as an answer."""
    problems = unseen(0, 2, (2, 3))

    class Taught:
        device = torch.device("cpu")

        def generate(self, input_ids, attention_mask, eos_token_id, **given):
            assert eos_token_id == 0
            asked = [bytes(row[mask.bool()].tolist()).decode()
                     for row, mask in zip(input_ids, attention_mask, strict=True)]  # fmt: skip
            chains = {f"<{problem.question}>": problem.solution for problem in problems}
            written = [[*chains[one].encode()] for one in asked]
            longest = max(map(len, written)) + 1
            behind = [row + [eos_token_id] * (longest - len(row)) for row in written]
            return torch.cat([input_ids, torch.tensor(behind)], 1)

    found = solved(Taught(), Words(), problems, together=2, end=0)
    assert all(one["right"] and one["as_taught"] for one in found)
    assert [one["decoded"] for one in found] == [len(one.solution) for one in problems]


def test_an_answer_is_ended_by_the_chat_where_there_is_one():
    words = Words()
    assert end_id(words) == 0
    words.get_vocab = lambda: {"<|im_end|>": 2}
    assert end_id(words) == 2
