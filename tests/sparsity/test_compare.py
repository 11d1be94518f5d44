"""Comparisons of policies: what they measure, what they refuse, and how they leave the model."""

import copy
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sparsity
from sparsity import (
    H2O,
    Evicting,
    Full,
    Problem,
    Quest,
    RaaS,
    Random,
    SparseCache,
    SparsityError,
    StreamingLLM,
    compare,
)
from sparsity.compare import DENSE, METRICS
from sparsity.hf.attach import is_attached
from sparsity.hf.decoding import TIMED_STEPS
from sparsity.problem import prompt_ids
from tests.helpers import random_ids, tiny_model
from tests.sparsity.helpers import left_as_it_was

CHAT = (
    "{% for m in messages %}w1 w2 {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w1 w3{% endif %}"
)
DISTANCES = ["extra_nll", "kl", "agreement"]
MEASURES = [*DISTANCES, "kept_bytes", "step_seconds"]


def numbered_tokenizer(template=None):
    """Word "w7" is token 7."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    tokenizer.chat_template = template
    return tokenizer


def text(tokens, seed=1):
    return " ".join(f"w{i}" for i in random_ids(tokens, seed=seed).tolist())


def ids_of(text):
    return torch.tensor([[int(word[1:]) for word in text.split()]])


TEXTS = [text(41), text(58, seed=2), text(35, seed=3)]
PROBLEMS = [Problem(text(13), ("w5",)), Problem(text(9, seed=2), ("w6", "w7 w8"))]


def by_hand(model, cache, ids, prompt):
    """Logits of each token behind the prompt, fed one by one, fp64 `[tokens, words]`."""
    with torch.no_grad():
        out = model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
        rows = [out.logits[0, -1]]
        for place in range(prompt, ids.shape[1] - 1):
            out = model(
                input_ids=ids[:, place : place + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            rows.append(out.logits[0, -1])
    return torch.stack(rows).double().log_softmax(-1)


def distances_by_hand(dense, other, target):
    nll, own = (-rows.gather(1, target[:, None]).mean() for rows in (other, dense))
    kl = torch.nn.functional.kl_div(other, dense, log_target=True, reduction="sum") / len(target)
    return [
        float(nll - own),
        float(kl),
        float((dense.argmax(1) == other.argmax(1)).double().mean()),
    ]


def test_a_policy_that_keeps_all_measures_what_dense_measures(shallow):
    arms = {"all": Full(), "few": StreamingLLM(12)}
    result = compare(shallow, numbered_tokenizer(), TEXTS, arms, prompt_tokens=8, progress=False)
    assert list(result) == [DENSE, "all", "few"]
    assert list(result[DENSE]) == MEASURES
    assert set(MEASURES) < set(METRICS)
    assert (result.units, result.unit) == (3, "texts")
    every, few = result.measured["all"], result.measured["few"]
    assert abs(every["extra_nll"]).max() < 1e-5
    assert every["kl"].max() < 1e-8
    np.testing.assert_array_equal(every["agreement"], 1.0)
    assert few["kl"].min() > 1e-3
    assert few["agreement"].max() < 1.0
    for metric, same in (("extra_nll", 0.0), ("kl", 0.0), ("agreement", 1.0)):
        np.testing.assert_array_equal(result.measured[DENSE][metric], same)


@pytest.mark.parametrize("policy", [StreamingLLM(12), H2O(16), Quest(8, 4, dense_layers=0)])
@pytest.mark.parametrize("tokens", [10, 11, 8 + TIMED_STEPS, 45])
def test_numbers_are_those_of_a_plain_loop(shallow, policy, tokens):
    """Also where dense is read in one piece, or has nothing to be read beside its timed steps."""
    tokenizer, ids = numbered_tokenizer(), ids_of(text(tokens))
    result = compare(
        shallow, tokenizer, [text(tokens)], [policy], prompt_tokens=8, progress=False
    ).measured
    target = ids[0, 8:]
    dense = by_hand(shallow, None, ids, 8)
    cache = SparseCache(shallow, policy)
    other = by_hand(shallow, cache, ids, 8)
    (name,) = [arm for arm in result if arm != DENSE]
    found = [result[name][metric][0] for metric in DISTANCES]
    assert found == pytest.approx(distances_by_hand(dense, other, target), abs=1e-6)
    with torch.no_grad():
        shallow(input_ids=ids[:, -1:], past_key_values=cache)  # the last token is fed, too
    assert result[name]["kept_bytes"][0] == cache.report().peak_bytes
    # of two layers keys and values of two heads of 16 numbers of 4 bytes
    assert result[DENSE]["kept_bytes"][0] == 2 * 2 * 2 * 16 * 4 * tokens
    assert min(result[DENSE]["step_seconds"][0], result[name]["step_seconds"][0]) > 0.0


def test_random_eviction_is_further_from_dense_than_a_larger_budget_is(shallow):
    arms = {"few": Random(10, recent=2), "more": Random(30, recent=2)}
    result = compare(shallow, numbered_tokenizer(), TEXTS, arms, prompt_tokens=8, progress=False)
    assert result.difference("few", "kl", of="more").low > 0.0
    assert result.difference("few", "kept_bytes", of="more").high < 0.0
    assert result.loss("few", "agreement").low > 0.0


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
def test_what_is_decoded_is_what_generate_decodes(shallow, template):
    arms = {"all": Full(), "few": StreamingLLM(6), "random": Random(20, recent=2)}
    tokenizer = numbered_tokenizer(template)
    result = compare(shallow, tokenizer, PROBLEMS, arms, new_tokens=15, progress=False)
    assert (result.units, result.unit) == (2, "problems")
    assert list(result[DENSE]) == [*DISTANCES, "accuracy", "f1", "kept_bytes", "step_seconds"]
    decoded = result.settings["decoded"]
    assert decoded["all"] == decoded[DENSE] != decoded["few"]
    for index, problem in enumerate(PROBLEMS):
        prompt = ids_of(f"w1 w2 {problem.prompt} w1 w3" if template else problem.prompt)
        assert prompt_ids(problem, tokenizer) == prompt[0].tolist()
        for name, policy in {DENSE: None, **arms}.items():
            cache = None if policy is None else SparseCache(shallow, policy)
            out = shallow.generate(
                prompt, past_key_values=cache, max_new_tokens=15, do_sample=False, eos_token_id=None
            )
            assert decoded[name][index] == tokenizer.decode(out[0, prompt.shape[1] :]), name
        dense = torch.cat([prompt, ids_of(decoded[DENSE][index])], 1)  # all arms are forced to it
        rows = [
            by_hand(shallow, cache, dense, prompt.shape[1])
            for cache in (None, SparseCache(shallow, arms["few"]))
        ]
        found = [result.measured["few"][metric][index] for metric in DISTANCES]
        expected = distances_by_hand(*rows, dense[0, prompt.shape[1] :])
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("new_tokens", [1, 4, 12])
def test_a_continuation_is_forced_and_what_is_decoded_is_not(shallow, new_tokens):
    """Also where arms would go on as the continuation does, up to its end and beyond."""
    tokenizer, prompt = numbered_tokenizer(), ids_of(text(13))
    own = shallow.generate(prompt, max_new_tokens=12, do_sample=False)[0, 13:]
    said = " ".join(f"w{i}" for i in own[:6].tolist())
    problems = [Problem(text(13), ("w5",), end) for end in (said, text(7), f"{said} w0 w0 w0")]
    arms = {"all": Full(), "few": StreamingLLM(6)}
    result = compare(shallow, tokenizer, problems, arms, new_tokens=new_tokens, progress=False)
    decoded = result.settings["decoded"]
    assert decoded[DENSE] == decoded["all"] == [tokenizer.decode(own[:new_tokens])] * 3
    few = shallow.generate(
        prompt,
        past_key_values=SparseCache(shallow, arms["few"]),
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    assert decoded["few"] == [tokenizer.decode(few[0, 13:])] * 3
    ids = torch.cat([prompt, ids_of(text(7))], 1)
    rows = [by_hand(shallow, c, ids, 13) for c in (None, SparseCache(shallow, arms["few"]))]
    found = [result.measured["few"][metric][1] for metric in DISTANCES]
    assert found == pytest.approx(distances_by_hand(*rows, ids[0, 13:]), abs=1e-6)


def test_decoding_stops_where_the_model_does(shallow):
    prompt = ids_of(text(13))
    own = shallow.generate(prompt, max_new_tokens=12, do_sample=False)[0, 13:].tolist()
    shallow.generation_config.eos_token_id = [own[3], 999]
    expected = own[: own.index(own[3]) + 1]
    arms = {"all": Full(), "few": StreamingLLM(6)}
    tokenizer = numbered_tokenizer()
    result = compare(
        shallow, tokenizer, [Problem(text(13), ("w5",))], arms, new_tokens=12, progress=False
    )
    for name in (DENSE, "all"):
        assert result.settings["decoded"][name] == [tokenizer.decode(expected)]


def test_answers_are_marked_where_the_user_looks_for_them(shallow):
    tokenizer, prompt = numbered_tokenizer(), ids_of(text(13))
    own = shallow.generate(prompt, max_new_tokens=6, do_sample=False)[0, 13:]
    last = tokenizer.decode(own[-1:])
    problems = [Problem(text(13), ("w0", last)), Problem(text(13), (f"{last} w0",))]
    result = compare(
        shallow,
        tokenizer,
        problems,
        [Full()],
        new_tokens=6,
        final=lambda text: text.split()[-1],
        progress=False,
    )
    for name in (DENSE, "Full()"):
        np.testing.assert_array_equal(result.measured[name]["accuracy"], [1.0, 0.0])
        np.testing.assert_allclose(result.measured[name]["f1"], [1.0, 2 / 3])


def test_an_answer_is_right_where_the_user_says_so(shallow):
    asked = []
    problems = [Problem(text(13), ("one", "two")), Problem(text(13), ("three",))]
    result = compare(
        shallow,
        numbered_tokenizer(),
        problems,
        [Full()],
        new_tokens=3,
        final=lambda text: "said",
        right=lambda said, answer: asked.append((said, answer)) or answer == "two",
        progress=False,
    )
    assert set(asked) == {("said", answer) for answer in ("one", "two", "three")}
    for name in (DENSE, "Full()"):
        np.testing.assert_array_equal(result.measured[name]["accuracy"], [1.0, 0.0])


def test_without_answers_only_distances_are_measured(shallow):
    problem = Problem(text(13))
    result = compare(
        shallow,
        numbered_tokenizer(),
        [problem],
        {"few": StreamingLLM(6)},
        new_tokens=9,
        progress=False,
    )
    assert list(result["few"]) == MEASURES
    assert result["few"]["kl"].estimate > 0.0
    assert json.loads(result.to_json())["settings"]["new_tokens"] == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(texts_or_problems=[]), r"texts_or_problems is \[\]: expected a list of at least one"),
        (dict(texts_or_problems="w1 w2"), "expected a list of at least one text"),
        (dict(texts_or_problems=[TEXTS]), "text 0 is of type list: .* without batches"),
        (dict(texts_or_problems=[TEXTS[0], PROBLEMS[0]]), "text 1 is of type Problem"),
        (dict(texts_or_problems=[PROBLEMS[0], "w1"]), "problem 1 is 'w1'"),
        (dict(texts_or_problems=[PROBLEMS[0], Problem("w1")]), "problem 1 has 0 answers and"),
        (dict(texts_or_problems=[text(9)]), "text 0 has 9 tokens, fewer than .* = 10"),
        (dict(texts_or_problems=[TEXTS[0], text(600)]), "text 1 needs 600 tokens .* 512 positions"),
        (dict(texts_or_problems=PROBLEMS, new_tokens=500), "problem 0 needs 513 .* new_tokens"),
        (
            dict(texts_or_problems=[Problem("w1", (), " ")]),
            "continuation of problem 0 has no",
        ),
        (dict(texts_or_problems=[Problem(" ")]), "the prompt of problem 0 has no tokens"),
        (dict(policies=[]), "policies is empty"),
        (dict(metrics=["accuracy"]), "'accuracy' needs answers: give them, or leave it out"),
        (dict(metrics=["speed"]), "there is no metric 'speed'; there are extra_nll"),
        (dict(metrics=[]), "metrics must be a list of names"),
        (dict(policies={}), "policies is empty"),
        (dict(policies=[RaaS(32), RaaS(32)]), r"two arms are named .RaaS\(budget=32"),
        (dict(policies={DENSE: RaaS(32)}), "two arms are named 'dense'"),
        (dict(policies={3: RaaS(32)}), "the name 3 of RaaS"),
        (dict(policies=[RaaS]), "the class RaaS, and not an object of it is no policy"),
        (dict(policies=RaaS(32)), "expected a list of policies"),
        (dict(policies={"r": RaaS(8, page_size=4)}), "nothing of the budget of 8 is left"),
        (dict(policies=[Full(), RaaS(16)], prompt_tokens=14), "room for 2 of the 27 behind it"),
        (dict(prompt_tokens=0), "prompt_tokens=0: expected a whole number of at least 1"),
        (dict(new_tokens=1.5), "new_tokens=1.5: expected a whole number"),
        (dict(final="last"), "final is 'last': expected a function"),
        (dict(right="same"), "right is 'same': expected a function of two texts"),
        (dict(model="llama"), "model is 'llama': expected a transformers model"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    shallow, monkeypatch, arguments, message
):
    def forward(*args, **kwargs):
        raise AssertionError("nothing may run")

    monkeypatch.setattr(shallow, "forward", forward)
    given = dict(model=shallow, texts_or_problems=TEXTS, policies=[Full()], prompt_tokens=8)
    given |= arguments
    with left_as_it_was(shallow), pytest.raises(SparsityError, match=message):
        compare(tokenizer=numbered_tokenizer(), progress=False, **given)


def test_a_pinned_prompt_may_leave_as_much_room_as_the_text_takes(shallow):
    call = dict(prompt_tokens=14, progress=False)
    result = compare(shallow, numbered_tokenizer(), [text(16)], {"r": RaaS(16)}, **call)
    assert result.measured["r"]["kl"][0] < 1e-8  # nothing was evicted
    with pytest.raises(SparsityError, match="room for 2 of the 3 behind it"):
        compare(shallow, numbered_tokenizer(), [text(17)], {"r": RaaS(16)}, **call)


def test_workers_are_not_sent_a_model_that_is_not_on_the_cpu():
    there = tiny_model("llama").to("meta")
    with pytest.raises(SparsityError, match="workers=2 would copy a model on meta into every"):
        compare(there, numbered_tokenizer(), TEXTS, [StreamingLLM(40)], workers=2, progress=False)


def test_an_error_says_at_which_problems_it_was_met(shallow):
    def right(said, answer):
        if answer == "w6":
            raise KeyError(answer)
        return 0.0

    with pytest.raises(KeyError, match="the cell is problem 1"):
        compare(
            shallow, numbered_tokenizer(), PROBLEMS, [StreamingLLM(40)], new_tokens=2, right=right,
            progress=False,
        )  # fmt: skip


def test_a_model_without_logits_is_refused(shallow):
    with pytest.raises(SparsityError, match="LlamaModel does not generate text"):
        compare(shallow.model, numbered_tokenizer(), TEXTS, [Full()], prompt_tokens=8)


@pytest.mark.parametrize("family", ["mistral_sliding", "gemma3", "qwen2"])
def test_layers_with_windows_are_what_they_are_in_dense(family):
    model = tiny_model(family)
    arms = {"all": Full(), "few": H2O(16)}
    result = compare(model, numbered_tokenizer(), TEXTS, arms, prompt_tokens=8, progress=False)
    assert result.measured["all"]["kl"].max() < 1e-8
    decides = family != "mistral_sliding"  # which has windows in all layers
    assert (result.measured["few"]["kl"].min() > 1e-6) == decides


def test_a_model_that_drops_at_random_is_refused(shallow, monkeypatch):
    shallow.config.attention_dropout = 0.5
    shallow.train()
    with pytest.raises(SparsityError, match="drops at random"):
        compare(shallow, numbered_tokenizer(), TEXTS, [Full()], prompt_tokens=8, progress=False)


@dataclass(frozen=True)
class Failing(Evicting):
    """Fails when it must evict."""

    def worth(self, pages):
        raise RuntimeError("no worth")


@pytest.mark.parametrize("attached", [False, True])
def test_the_model_is_left_as_it_was(shallow, attached):
    weights, ids = copy.deepcopy(shallow.state_dict()), ids_of(text(20))
    cache = None
    if attached:  # one that the user is in the middle of
        cache = SparseCache(shallow, H2O(8))
        expected = by_hand(shallow, SparseCache(shallow, H2O(8)), ids, 12)
        first = by_hand(shallow, cache, ids[:, :15], 12)
    before = shallow(ids).logits
    call = dict(prompt_tokens=8, progress=False)
    compare(shallow, numbered_tokenizer(), TEXTS[:1], [H2O(16), Quest(32)], **call)
    assert is_attached(shallow) == attached
    with pytest.raises(RuntimeError, match="no worth"):
        compare(shallow, numbered_tokenizer(), TEXTS[:1], [Full(), Failing(12)], **call)
    assert is_attached(shallow) == attached
    assert torch.equal(shallow(ids).logits, before)
    for name, tensor in shallow.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    if attached:
        torch.testing.assert_close(first, expected[:3])
        rest = by_hand(shallow, cache, ids[:, 14:], 1)
        torch.testing.assert_close(rest, expected[2:][1:])
        sparsity.detach(shallow)
    with left_as_it_was(shallow):
        assert shallow.config._attn_implementation == "sdpa"


def test_a_bar_is_shown_where_it_is_wanted(shallow, capfd):
    call = dict(prompt_tokens=8)
    compare(shallow, numbered_tokenizer(), TEXTS[:1], [Full()], progress=False, **call)
    assert capfd.readouterr().err == ""
    compare(shallow, numbered_tokenizer(), TEXTS[:1], [Full()], **call)
    assert "2/2" in capfd.readouterr().err


def test_the_example_of_the_docs_runs(shallow, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "sparsity.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "compare(" in b]
    monkeypatch.chdir(tmp_path)
    names = {"model": shallow, "tokenizer": numbered_tokenizer(), "texts": [text(170)]}
    exec(compile(block, "docs/sparsity.md", "exec"), names)
    record = json.loads((tmp_path / "result.json").read_text())
    assert [row["arm"] for row in record["table"]] == [DENSE, "RaaS", "Quest", "random"]


def test_the_step_is_the_median(shallow, monkeypatch):
    """Of dense over the steps in the middle, of the others over all behind the prompt."""
    from sparsity.hf import decoding

    ticks = iter(range(10_000))
    spans = []

    def clock():
        tick = next(ticks)
        spans.append(tick * tick)  # each step takes longer than the one before
        return float(spans[-1])

    monkeypatch.setattr(decoding.time, "perf_counter", clock)
    result = compare(
        shallow, numbered_tokenizer(), [text(30)], {"all": Full()}, prompt_tokens=8, progress=False
    )
    took = [b - a for a, b in zip(spans[::2], spans[1::2], strict=True)]
    assert len(took) == TIMED_STEPS + 22
    assert result.measured[DENSE]["step_seconds"][0] == statistics.median(took[:TIMED_STEPS])
    assert result.measured["all"]["step_seconds"][0] == statistics.median(took[TIMED_STEPS:])
