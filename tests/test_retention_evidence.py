"""Layer by layer is token by token; the texts; and how the numbers are summed up."""

import gzip
import json
import random
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsity import (
    H2O,
    Full,
    LazyEviction,
    Quest,
    RaaS,
    Random,
    ShareRaaS,
    SnapKV,
    StreamingLLM,
    compare,
)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES / "experiments"), str(EXAMPLES / "benchmarks")]
import layer_by_layer  # noqa: E402 - the examples are scripts, not a package
import raas_stamps  # noqa: E402
import retention_evidence  # noqa: E402
import retention_texts  # noqa: E402
import sink_share  # noqa: E402
from loaded import loaded  # noqa: E402
from reference_tasks import reasoning_problem  # noqa: E402
from retention_evidence_summary import METRICS, beside, draw, drawn, summary, tables  # noqa: E402
from retention_ways import FREE, PINNED, REASONING, SMALL, WAYS  # noqa: E402

PROMPT, TOKENS = 20, 150
POLICIES = [
    RaaS(32, page_size=4, pin_prompt=False),
    RaaS(48, page_size=4),
    ShareRaaS(32),
    H2O(32),
    Quest(32, page_size=4, dense_layers=0),
    Random(32, pin_prompt=False),
    StreamingLLM(32),
    SnapKV(32, window=8, evict_every=8),
    LazyEviction(32, evict_every=8, ties="score"),
]


@pytest.fixture(scope="module")
def reference():
    """The reference model, and two texts of it of the same number of tokens."""
    model, tokenizer = loaded("reference")
    draws, texts = random.Random(0), []
    for _ in range(2):
        problem = reasoning_problem(draws, 20)
        words = (problem.prompt + problem.solution).split(" ")
        text = next(
            text
            for stop in range(len(words), 0, -1)
            if len(tokenizer(text := " ".join(words[:stop]))["input_ids"]) <= TOKENS
        )
        texts.append(text)
    return model, tokenizer, texts


def walked(model, ids, policy, real=None, beside=(), prompt=PROMPT):
    """What `apart` finds of the policy, others going beside it."""
    texts = layer_by_layer.Texts(ids, prompt, real)
    dense = layer_by_layer.hidden_states(model, texts)[0]
    walks = [layer_by_layer.Walk(model, one, texts) for one in (*beside, policy)]
    found = layer_by_layer.hidden_states(model, texts, walks)[-1]
    return layer_by_layer.apart(model, texts, dense, found)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_layer_by_layer_is_token_by_token(reference, policy):
    model, tokenizer, texts = reference
    ids = torch.tensor([tokenizer(texts[0])["input_ids"]])
    expected = compare(model, tokenizer, texts[:1], {"arm": policy}, prompt_tokens=PROMPT,
                       progress=False).measured["arm"]  # fmt: skip
    for name, values in zip(METRICS, walked(model, ids, policy), strict=True):
        assert float(values.mean()) == pytest.approx(float(expected[name][0]), abs=2e-5)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_memory_of_fixed_size_and_rows_together_give_the_same(reference, policy, monkeypatch):
    """As it goes on a GPU, but for the graph; every row as it is alone."""
    model, tokenizer, texts = reference
    shortest = min(len(tokenizer(text)["input_ids"]) for text in texts)
    ids = torch.tensor([tokenizer(text)["input_ids"][:shortest] for text in texts])
    alone = torch.cat([walked(model, row[None], policy) for row in ids], 1)
    torch.testing.assert_close(walked(model, ids, policy), alone, atol=1e-4, rtol=1e-3)

    def fixed(model, policy, max_tokens, static):
        return layer_by_layer_cache(model, policy, max_tokens=max_tokens, static=True)

    layer_by_layer_cache = layer_by_layer.SparseCache
    monkeypatch.setattr(layer_by_layer, "SparseCache", fixed)
    beside = [Full(), Random(48, pin_prompt=False)]
    together = walked(model, ids, policy, beside=beside)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("policy", "static"),
    [*((policy, True) for policy in POLICIES), *((policy, False) for policy in POLICIES[:3])],
    ids=str,
)
def test_a_row_with_padding_in_front_is_as_it_is_alone(reference, policy, static, monkeypatch):
    """The prompt of the second row is shorter, and so is its text."""
    model, tokenizer, texts = reference
    cache, padding = layer_by_layer.SparseCache, 7

    def made(model, policy, max_tokens, **given):
        return cache(model, policy, max_tokens=max_tokens, static=static)

    monkeypatch.setattr(layer_by_layer, "SparseCache", made)
    rows = torch.tensor([tokenizer(text)["input_ids"][:100] for text in texts])
    rows[1, padding:] = rows[1, :-padding].clone()
    real = torch.ones_like(rows, dtype=torch.bool)
    real[1, :padding] = False
    together = walked(model, rows, policy, real)
    alone = walked(model, rows[1:, padding:], policy, prompt=PROMPT - padding)
    torch.testing.assert_close(together[:, 1:], alone, atol=1e-4, rtol=1e-3)
    alone = walked(model, rows[:1], policy)
    torch.testing.assert_close(together[:, :1], alone, atol=1e-4, rtol=1e-3)


def test_full_is_dense(reference):
    model, tokenizer, texts = reference
    ids = torch.tensor([tokenizer(texts[0])["input_ids"]])
    extra, divergence, agreement = walked(model, ids, Full())
    assert extra.abs().max() < 1e-3  # of a token that is all but impossible
    assert divergence.abs().max() < 1e-4
    assert agreement.mean() == 1


def test_every_arm_has_a_name_and_a_twin_and_every_family_one_default():
    labels = [way.label for way in (*WAYS, *PINNED)]
    assert len(set(labels)) == len(labels)
    assert {way.twin for way in (*WAYS, *PINNED) if way.twin} <= set(labels)
    labels = [way.label for way in WAYS]
    assert {way.twin for way in WAYS if way.twin} <= set(labels)
    assert {*FREE, *SMALL} <= set(labels)
    for family in {way.family for way in WAYS}:
        assert sum(way.default for way in WAYS if way.family == family) == 1
    for way in (*WAYS, *PINNED):
        for budget in (128, 256, 512, 1024):
            assert way.policy(budget).budget in (budget, budget // 2)
    assert {way.twin for way in REASONING if way.twin} <= {way.label for way in REASONING}


SET = {
    "Quest": {"dense_layers"},
    "Quest on the prompt, RaaS behind": {"prompt_budget"},
    "SnapKV, decoding too": {"window", "evict_every"},
    "PyramidKV, decoding too": {"window", "evict_every"},
    "R-KV": {"evict_every"},
    "LazyEviction": {"evict_every"},
    "VaSE": {"window", "large", "evict_every"},
}
"""What `Way.policy` says is set in every arm of a family; at 1,024 no class has the same."""


@pytest.mark.parametrize("way", [way for way in WAYS if way.default], ids=lambda way: way.label)
def test_a_default_is_the_class_as_it_comes(way):
    policy = way.policy(1024)
    plain = type(policy)(policy.budget)
    differ = {
        field.name
        for field in fields(policy)
        if getattr(policy, field.name) != getattr(plain, field.name)
    }
    assert differ == SET.get(way.family, set())


@pytest.mark.parametrize("budget", [128, 256, 512, 1024])
@pytest.mark.parametrize(
    "way", [way for way in (*WAYS, *PINNED) if way.twin], ids=lambda way: way.label
)
def test_a_twin_holds_as_much_in_the_same_pages(way, budget):
    """As many tokens before and after an eviction, the first ones and the prompt kept alike."""
    twin = next(other for other in (*WAYS, *PINNED) if other.label == way.twin)
    assert isinstance(twin.policy(budget), Random)
    names = ("page_size", "pages_kept", "pages_held", "sinks", "pin_prompt", "pins_count")
    for name in names:
        assert getattr(way.policy(budget), name) == getattr(twin.policy(budget), name), name


def test_who_has_no_twin():
    """What holds more than the budget, and eviction at random itself."""
    assert {way.family for way in WAYS if not way.twin} == {
        "random", "Quest", "Quest on the prompt, RaaS behind"
    }  # fmt: skip
    assert {way.label for way in WAYS if way.control} < {way.twin for way in WAYS}


def test_what_an_answer_repeats():
    assert retention_evidence.repeated(list(range(100))) == 0
    assert retention_evidence.repeated([1, 2] * 50) == pytest.approx(1 - 2 / 93)
    assert retention_evidence.repeated([1]) == 0


@pytest.mark.parametrize(("ends", "answer"), [(2, [5, 1]), ([7, 1], [5]), (None, [5, 1, 2, 2])])
def test_an_answer_stops_at_what_ends_it_for_generate(ends, answer):
    assert retention_evidence.ended([5, 1, 2, 2], ends) == answer


def made(loss, texts=16):
    """A record of made-up numbers: `loss(arm, text)`."""
    rows = []
    for way in WAYS:
        values = [[loss(way.label, text)] * 8 for text in range(texts)]
        row = {"kind": "forced", "arm": way.label, "budget": 256}
        rows.append(row | dict.fromkeys(METRICS, values))
    rows.append({"kind": "forced", "arm": "H2O, 4 sinks", "budget": 8, "refused": "too small"})
    free = {"kind": "free", "budget": 256, "decoding": "", "length": [5, 9, 5, 9],
            "repeated": [0, 0.5, 0, 0.5]}  # fmt: skip
    rows += [free | {"arm": arm} for arm in FREE]
    configuration = {"texts": texts, "tokens": 80, "seed": 0}
    return {"configuration": configuration, "environment": {}, "seconds": 1.0, "rows": rows}


def test_settings_are_chosen_on_one_half_and_reported_on_the_other(tmp_path):
    """One setting is best on the first half of the texts and worst on the other."""

    def loss(arm, text):
        if arm == "H2O, 4 sinks":
            return 0.1 if text // 2 % 2 == 0 else 0.9
        return 0.5

    summed = summary(made(loss))
    row = next(row for row in summed["chosen"] if row["policy"] == "H2O")
    assert (row["arm"], row["default"]) == ("H2O, 4 sinks", "H2O, no sinks")
    assert row["extra_nll"] == pytest.approx([0.9] * 3)
    assert row["minus_default"] == pytest.approx([0.4] * 3)
    json.dumps(summed)
    assert "H2O, 4 sinks" in tables(summed)
    draw(summed, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    what, rows = drawn(summed)
    assert what == "settings chosen on the other half of the texts"
    assert [row["policy"] for row in rows] == list(dict.fromkeys(way.family for way in WAYS))
    shown = next(row for row in rows if row["policy"] == "H2O")
    assert shown["by_stretch"] == pytest.approx([0.9] * 8)  # not what it was chosen for


def test_a_twin_of_others_is_no_setting_to_choose():
    summed = summary(made(lambda arm, text: -1.0 if "a quarter" in arm else 0.5))
    row = next(row for row in summed["chosen"] if row["policy"] == "random")
    assert (row["settings"], row["extra_nll"][0]) == (3, pytest.approx(0.5))


@pytest.mark.parametrize(("texts", "ends"), [(6, 0), (8, 2)])
def test_few_texts_of_a_kind_have_no_interval_and_choose_nothing(texts, ends, tmp_path):
    summed = summary(made(lambda arm, text: 0.5 + text / 10, texts))
    assert all(len(row["extra_nll"]) == 1 + ends for row in summed["rows"])
    assert summed["chosen"] == []
    what, rows = drawn(summed)
    assert what == "default settings"
    assert {row["arm"] for row in rows} == {way.label for way in WAYS if way.default}
    assert ("(" in tables(summed).split("| H2O, no sinks |")[1].split("\n")[0]) == (ends == 2)
    draw(summed, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_smaller_run_in_its_order_beside_a_larger_one():
    order = {way.label: place for place, way in enumerate(WAYS)}
    small, large = (
        summary(made(lambda arm, text, sign=sign: sign * order[arm])) for sign in (1, -1)
    )
    table = beside(small, large)
    assert table.endswith(f"Rank correlation of the {len(WAYS)} arms: -1.00.")
    shown = [line.split(" | ")[0] for line in table.splitlines()[2 : 2 + len(WAYS)]]
    assert shown == [f"| {way.label}" for way in WAYS]
    assert beside(small, small).endswith("arms: 1.00.")


def test_intervals_are_paired_with_the_twin():
    draws = np.random.default_rng(0)
    of_text = draws.normal(0, 1, 16)
    summed = summary(made(lambda arm, text: of_text[text] + ("random" in arm)))
    rows = [row for row in summed["rows"] if row["arm"] == "H2O, no sinks"]
    assert {row["texts"] for row in rows} == {"both", "novel", "solutions"}
    for row in rows:
        assert row["minus_random"] == pytest.approx([-1.0] * 3)


@pytest.fixture
def folder():
    found = Path(__file__).parents[2] / "shared" / "data"
    if not (found / "math500").exists():
        pytest.skip(f"the data sets' files are not in {found}")
    return found


def test_a_run_that_was_cut_off_goes_on_where_it_was(folder, tmp_path, monkeypatch, capsys):
    """Forced and free arms of the reference model; nothing is measured twice."""
    given = "--model reference --texts 4 --tokens 120 --prompt 20 --budgets 64 --free-budget 64"
    given += " --questions 2 --answer 12"

    def run(*more):
        argv = ["x", *given.split(), "--data", str(folder), "--out", str(tmp_path), *more]
        monkeypatch.setattr(sys, "argv", argv)
        retention_evidence.main()
        packed = (tmp_path / retention_evidence.MEASURED).read_bytes()
        return {
            (row["kind"], row["arm"]): row for row in json.loads(gzip.decompress(packed))["rows"]
        }

    first = run("--arms", "RaaS, 4 sinks")
    assert set(first) == {
        (kind, arm)
        for kind in ("forced", "free")
        for arm in ("RaaS, 4 sinks", "ShareRaaS, 4 sinks")
    }
    assert all("refused" not in row for row in first.values())
    again = run("--arms", "TOVA, no sinks")
    assert {name: again[name] for name in first} == first
    assert set(again) - set(first) == {("forced", "TOVA, no sinks")}
    row = first["forced", "RaaS, 4 sinks"]
    assert np.array(row["extra_nll"]).shape == (4, retention_evidence.STRETCHES)
    assert "TOVA, no sinks" in capsys.readouterr().out
    late = run("--arms", "H2O", "--seconds", "-1")
    assert late == again
    with pytest.raises(SystemExit, match="another configuration"):
        run("--seed", "3")


def test_texts_share_no_passage_and_come_again(folder):
    _, tokenizer = loaded("reference")
    ids = retention_texts.texts(tokenizer, folder, 4, 300, 0)
    assert ids.shape == (4, 300)
    assert torch.equal(ids, retention_texts.texts(tokenizer, folder, 4, 300, 0))
    assert len({tuple(row[:50].tolist()) for row in ids}) == 4
    with pytest.raises(SystemExit, match="ask for fewer or shorter"):
        retention_texts.texts(tokenizer, folder, 4, 10**6, 0)


def test_a_threshold_that_every_page_passes_is_first_in_first_out(reference):
    """Then the pages held are the newest ones; the numbers of a look are shares and an age."""
    model, tokenizer, texts = reference
    ids = torch.tensor([tokenizer(texts[0])["input_ids"]])
    seen = raas_stamps.recorded(model, ids, [1])
    assert list(seen) == [1]
    policy = RaaS(16, page_size=4, pin_prompt=False, alpha=1e-30)
    found = raas_stamps.looks(policy, seen, 1, PROMPT)
    assert len(found) > 3
    for newest, age, first_held, kept in found:
        assert newest == 1
        assert 6 <= age <= 9.5  # of pages that began 0 to 15 tokens ago
        assert first_held == 0
        assert 0 < kept < 1
    whole = raas_stamps.looks(RaaS(400, page_size=4), seen, 1, PROMPT)
    assert all(kept == pytest.approx(1) for *_, kept in whole)


def test_stamps_at_given_budgets_are_three_thresholds_at_every_page_size(
    folder, tmp_path, monkeypatch
):
    given = ["--model", "reference", "--data", str(folder), "--texts", "2", "--tokens", "120"]
    more = ["--layers", "1", "--budgets", "32", "--name", "long", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["raas_stamps.py", *given, *more])
    raas_stamps.main()
    record = json.loads((tmp_path / "long.json").read_text())
    rows = record["rows"]
    assert [(row["arm"], row["page_size"]) for row in rows] == [
        (arm, size) for size in (16, 4, 1) for arm in ("0.0001", "top half", "1 / pages")
    ]
    assert {row["budget"] for row in rows} == {32}
    halves = [row["newest_stamp"] for row in rows if row["arm"] == "top half"]
    assert halves == pytest.approx([0.5] * 3, abs=0.15)
    assert len(record["configuration"]["layers"]) == 1


def test_the_share_of_the_first_tokens_is_that_of_the_models_own_weights(reference, monkeypatch):
    """The last query of the beginnings of a text, as eager attention of the model weighs it."""
    model, tokenizer, texts = reference
    ids = torch.tensor([tokenizer(texts[0])["input_ids"][:100]])
    lengths = (64, 100)
    monkeypatch.setattr(sink_share, "LENGTHS", lengths)
    found = sink_share.shares(model, ids)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = torch.stack(model(ids, output_attentions=True).attentions)
    finally:
        model.set_attn_implementation(before)
    for row, stop in zip(found, lengths, strict=True):
        expected = weights[:, 0, :, stop - 1, :4].sum(-1).mean()
        assert float(row) == pytest.approx(float(expected), rel=1e-4)
