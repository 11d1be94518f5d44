"""Comparisons in batches measure what they measure of one text at a time."""

import copy
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity import (
    H2O,
    Full,
    Problem,
    Quest,
    RaaS,
    Random,
    SnapKV,
    SparsityError,
    StreamingLLM,
    compare,
)
from sparsity.compare import DENSE
from sparsity.hf import decoding
from sparsity.tasks import Task, batches_of
from tests.helpers import tiny_model
from tests.sparsity.test_compare import CHAT, DISTANCES, ids_of, numbered_tokenizer, text
from tests.sparsity.zoo import shallow_model

ARMS = {
    "Full": Full(),
    "RaaS": RaaS(32, page_size=4, dense_layers=1),
    "RaaS that pins no prompt": RaaS(12, page_size=4, pin_prompt=False),
    "Quest": Quest(8, 4, dense_layers=0),
    "H2O": H2O(16),
    "StreamingLLM": StreamingLLM(12),
    "SnapKV": SnapKV(12, window=4),
    "Random": Random(20, recent=2, pin_prompt=False),
}


def results(model, given, batch_size, arms=ARMS, template=None, **arguments):
    """Of one at a time, and of a batch; how far they are apart is checked here."""
    alone, together = (
        compare(
            model,
            numbered_tokenizer(template),
            given,
            arms,
            batch_size=size,
            progress=False,
            **arguments,
        )
        for size in (1, batch_size)
    )
    assert list(alone) == list(together) == [DENSE, *arms]
    for arm in alone:
        expected, found = alone.measured[arm], together.measured[arm]
        assert list(found) == list(expected)
        for metric in DISTANCES:
            np.testing.assert_allclose(
                found[metric], expected[metric], atol=1e-5, err_msg=f"{arm}: {metric}"
            )
    for name in ("decoded", "prompt_tokens"):
        assert together.settings.get(name) == alone.settings.get(name)
    assert together.settings["batch_size"] == batch_size
    return alone, together


FEW = {name: ARMS[name] for name in ("Full", "H2O", "RaaS")}
MODELS = {family: shallow_model(family) for family in ("llama", "qwen3")}


@settings(max_examples=2, deadline=None, derandomize=True)
@given(st.lists(st.integers(11, 37), min_size=3, max_size=3), st.integers(2, 3), st.integers(2, 9))
def test_texts_in_batches_measure_what_they_do_alone(lengths, batch_size, prompt_tokens):
    texts = [text(length, seed=seed) for seed, length in enumerate(lengths)]
    results(MODELS["llama"], texts, batch_size, prompt_tokens=prompt_tokens)


class Drawn(NamedTuple):
    """A problem of so many tokens; `said` tokens of continuation, or None."""

    prompt: int
    said: int | None


drawn = st.builds(Drawn, st.integers(1, 19), st.none() | st.integers(1, 16))


@pytest.mark.parametrize("answered", [False, True])
@settings(max_examples=2, deadline=None, derandomize=True)
@given(st.lists(drawn, min_size=3, max_size=3), st.integers(2, 3))
def test_problems_in_batches_measure_what_they_do_alone(answered, drawn, batch_size):
    """Prompts of unlike length, with continuations and without."""
    problems = [
        Problem(
            text(one.prompt, seed=seed),
            ("w5",) if answered else (),
            None if one.said is None else text(one.said, seed=seed + 50),
        )
        for seed, one in enumerate(drawn)
    ]
    results(MODELS["qwen3"], problems, batch_size, new_tokens=9)


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
def test_rows_end_where_they_do_alone(template):
    """Tokens that stop are among those decoded, early in some rows and late in others."""
    model = copy.deepcopy(MODELS["llama"])
    problems = [Problem(text(n, seed=n), ("w5",)) for n in (5, 17, 11, 8, 14)]
    free = compare(
        model, numbered_tokenizer(template), problems, [Full()], new_tokens=19, progress=False
    )
    said = [ids_of(line)[0].tolist() for line in free.settings["decoded"][DENSE]]
    model.generation_config.eos_token_id = [said[0][2], said[1][9], said[2][0]]
    _, together = results(model, problems, 4, arms=FEW, new_tokens=19, template=template)
    lengths = {len(line.split()) for line in together.settings["decoded"][DENSE]}
    assert len(lengths) > 2  # or nothing has been shown


def test_continuations_that_arms_would_say_themselves():
    """They go on as they are forced in some rows up to the end and beyond, in others not at all."""
    model, tokenizer = MODELS["llama"], numbered_tokenizer()
    prompts = [text(n, seed=n) for n in (6, 13, 9)]
    own = [
        model.generate(ids_of(prompt), max_new_tokens=12, do_sample=False)[0, -12:]
        for prompt in prompts
    ]
    said = [tokenizer.decode(own[0][:4]), tokenizer.decode(own[1]), text(7)]
    problems = [Problem(prompt, ("w5",), end) for prompt, end in zip(prompts, said, strict=True)]
    for new_tokens in (3, 9, 12):
        _, together = results(model, problems, 3, arms=FEW, new_tokens=new_tokens)
        expected = [tokenizer.decode(tokens[:new_tokens]) for tokens in own]
        assert together.settings["decoded"][DENSE] == expected
        assert together.settings["decoded"]["Full"] == expected


@pytest.mark.parametrize("family", ["mistral_sliding", "gemma3"])
def test_windows_in_batches(family):
    texts = [text(n, seed=n) for n in (29, 40, 35)]
    model = tiny_model(family)
    results(model, texts, 3, arms=FEW, prompt_tokens=7)
    problems = [Problem(text(n, seed=n), ("w5",)) for n in (4, 23, 9)]
    results(model, problems, 3, arms=FEW, new_tokens=15)


def test_bytes_are_of_a_row_and_steps_of_a_batch():
    """Texts of one length hold as many bytes each as alone; steps are those of all together."""
    texts = [text(33, seed=seed) for seed in range(3)]
    alone, together = results(MODELS["llama"], texts, 3, prompt_tokens=8)
    for arm in alone:
        np.testing.assert_array_equal(
            together.measured[arm]["kept_bytes"], alone.measured[arm]["kept_bytes"]
        )
        assert len(set(together.measured[arm]["step_seconds"])) == 1
    longer = results(
        MODELS["llama"], [*texts, text(43)], 4, arms={"Full": Full()}, prompt_tokens=8
    )[1]
    each = 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, numbers, bytes
    np.testing.assert_array_equal(longer.measured[DENSE]["kept_bytes"], [43 * each] * 4)


def test_texts_of_like_length_share_a_batch():
    tasks = [Task([1] * 4, [1] * n) for n in (9, 30, 8, 31, 10)]
    assert batches_of(tasks, 1) == [[2], [0], [4], [1], [3]]
    assert batches_of(tasks, 3) == [[2, 0, 4], [1, 3]]
    tasks[2] = Task([1], None, 9)  # nothing to force it to
    assert batches_of(tasks, 9) == [[0, 4, 1, 3], [2]]


def test_a_forward_is_of_the_whole_batch(monkeypatch):
    shapes = []
    read = decoding.Decoding.read

    def noted(self, ids, keep):
        shapes.append(tuple(ids.shape))
        return read(self, ids, keep)

    monkeypatch.setattr(decoding.Decoding, "read", noted)
    texts = [text(n) for n in (20, 30, 22, 25)]
    results(MODELS["llama"], texts, 3, arms={"few": StreamingLLM(12)}, prompt_tokens=8)
    alone = sum(n - 8 for n in (20, 30, 22, 25))
    assert shapes.count((1, 1)) == 4 * decoding.TIMED_STEPS + alone + decoding.TIMED_STEPS + 22
    assert shapes.count((3, 1)) == decoding.TIMED_STEPS + 25 - 8


@pytest.mark.parametrize(
    ("sizes", "policy", "message"),
    [
        ([(490, 5), (9, 30)], Full(), r"0 needs 520 tokens \(5 of its own: a smaller batch_size"),
        ([(14, 2), (9, 5)], RaaS(16), r"room for 2 of the 5 behind it \(2 of its own: a smaller"),
    ],
)
def test_rows_that_cannot_go_on_to_the_end_of_their_batch(sizes, policy, message, monkeypatch):
    model = copy.deepcopy(MODELS["llama"])
    problems = [Problem(text(prompt), (), text(said)) for prompt, said in sizes]
    call = dict(policies=[policy], progress=False)
    compare(model, numbered_tokenizer(), problems, **call)
    monkeypatch.setattr(model, "forward", None)  # nothing may run
    with pytest.raises(SparsityError, match=message):
        compare(model, numbered_tokenizer(), problems, batch_size=2, **call)


@pytest.mark.parametrize("batch_size", [0, 1.5, None])
def test_what_is_no_batch_size(batch_size):
    with pytest.raises(SparsityError, match=f"batch_size={batch_size}: expected a whole number"):
        compare(MODELS["llama"], numbered_tokenizer(), [text(20)], [Full()], batch_size=batch_size)


def test_padding_is_on_the_left_and_none_is_none():
    ids, pads = decoding.left_padded([[7, 8], [9]], torch.device("cpu"))
    assert ids.tolist() == [[7, 8], [0, 9]]
    assert pads.tolist() == [0, 1]
    assert decoding.left_padded([[7], [9]], torch.device("cpu"))[1] is None
    assert decoding.right_padded([[7, 8], [9]], torch.device("cpu")).tolist() == [[7, 8], [9, 0]]
