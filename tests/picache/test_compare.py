"""Comparisons of link methods: what they measure, what they refuse, how they show themselves."""

from dataclasses import dataclass, replace
from importlib import import_module as module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from picache import (
    APE,
    PIC,
    Arm,
    CacheBlend,
    ChunkStore,
    DummySinks,
    FullRecompute,
    LegoLink,
    LinkMethod,
    NaiveReuse,
    PICacheError,
    Problem,
    ProphetKV,
    SharedPrefix,
    arms,
    compare,
)
from picache.answers import begins, f1
from picache.compare import FULL, METRICS
from picache.hf.model import HFModel
from picache.problem import pieces
from tests.helpers import tiny_model

WORDS = "the cat dog bird sits sleeps sings on mat roof where is who a b c d e f".split()
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<s>assistant :{% endif %}"
)


def tokenizer_of(template=None):
    vocabulary = {w: i for i, w in enumerate(["<s>", "<unk>", "user", "assistant", ":", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", eos_token="<unk>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<s>"]})
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


PROBLEMS = [
    Problem(("the cat sits on the mat", "the dog sleeps on"), "where is the cat", ("mat",)),
    Problem(("a bird sings", "the cat sleeps", "the dog sits"), "who sings", ("bird", "a bird")),
    Problem(("the dog sits on a mat",), "who sits", ("dog",), lead="the"),
]  # fmt: skip


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
def test_recomputing_everything_measures_what_full_prefill_measures(model, template):
    result = compare(
        model, tokenizer_of(template), PROBLEMS, [FullRecompute(), NaiveReuse()], progress=False
    )
    assert list(result) == [FULL, "FullRecompute()", "NaiveReuse(force_query=True)"]
    assert result.units == 3
    assert list(result[FULL]) == list(METRICS)
    assert len(result.settings["prompt_tokens"]) == 3
    said = result.settings["decoded"]
    assert list(said) == list(result)
    assert said["FullRecompute()"] == said[FULL]
    full, exact = result.measured[FULL], result.measured["FullRecompute()"]
    for metric in ("accuracy", "f1", "agreement"):
        np.testing.assert_array_equal(exact[metric], full[metric])
    assert abs(exact["extra_nll"]).max() < 1e-5
    assert exact["kl"].max() < 1e-8
    naive = result.measured["NaiveReuse(force_query=True)"]
    assert naive["kl"].min() > 1e-7  # chunks that saw nothing of each other
    assert (naive["recomputed"] < 1.0).all()
    assert (full["operations"] == 1.0).all()
    assert (naive["operations"] < exact["operations"]).all()


def test_numbers_are_those_of_a_computation_by_hand(model):
    """One problem, naive: the ids as the pieces say, the answer's likelihood behind the link."""
    tokenizer, problem = tokenizer_of(), PROBLEMS[0]
    result = compare(model, tokenizer, [problem], [LegoLink(2)], progress=False)
    prefix, documents, query = pieces(problem, tokenizer)
    ids = tokenizer(" ".join([prefix, *documents, query]), return_tensors="pt")["input_ids"]
    answer = tokenizer("mat", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = model(torch.cat([ids, answer], 1)).logits[0, -2].double().log_softmax(-1)
    pic = PIC(model, tokenizer, flops_per_byte=None)
    chunks = [pic.compile(text, first=not i) for i, text in enumerate((prefix, *documents))]
    prompt = pic.link(chunks, query, LegoLink(2))
    assert torch.equal(prompt["input_ids"], ids)
    linked = prompt.logits[0].double().log_softmax(-1)
    measured = result.measured["LegoLink(k=2)"]
    expected = float(plain[answer[0, 0]] - linked[answer[0, 0]])
    assert measured["extra_nll"][0] == pytest.approx(expected, abs=1e-5)
    expected = float((plain.exp() * (plain - linked)).sum())
    assert measured["kl"][0] == pytest.approx(expected, abs=1e-6)


def test_without_answers_only_distances_are_measured(model):
    problem = Problem(("the cat sits", "the dog sleeps"), "who sits")
    result = compare(model, tokenizer_of(), [problem], [NaiveReuse()], progress=False, new_tokens=3)
    row = result["NaiveReuse(force_query=True)"]
    assert set(METRICS) - set(row) == {"accuracy", "f1"}
    assert row["kl"].estimate > 0.0
    with pytest.raises(PICacheError, match="no 'accuracy' of"):
        result.difference("NaiveReuse(force_query=True)", "accuracy")


def test_metrics_can_be_chosen(model):
    asked = ["kl", "accuracy"]
    result = compare(
        model, tokenizer_of(), PROBLEMS[:1], [LegoLink(2)], progress=False, metrics=asked
    )
    assert list(result["LegoLink(k=2)"]) == ["accuracy", "kl"]
    assert result.figure().get_ylabel() == "kl"


def test_arms_are_named_and_may_differ_in_sinks(model):
    arms = [LegoLink(2), Arm(LegoLink(2), DummySinks(2))]
    result = compare(model, tokenizer_of(), PROBLEMS[:1], arms, progress=False)
    assert list(result)[1:] == [
        "LegoLink(k=2)",
        "LegoLink(k=2), DummySinks(count=2, token=None)",
    ]
    named = {"ours": LegoLink(2), "theirs": NaiveReuse()}
    assert list(compare(model, tokenizer_of(), PROBLEMS[:1], named, progress=False))[1:] == [
        "ours",
        "theirs",
    ]


def test_the_fair_arms_are_compared_with_full_prefill_first(model):
    made = arms("fair", k=2)
    result = compare(model, tokenizer_of(CHAT), PROBLEMS[:2], made, progress=False)
    assert list(result) == list(made)
    behind, alone = (result.measured[name] for name in ("LegoLink-2, 4 dummies", "LegoLink-2"))
    np.testing.assert_array_equal(behind["recomputed"], alone["recomputed"])
    assert (behind["kl"] != alone["kl"]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(problems=[]), "at least one Problem"),
        (dict(problems=["who"]), "problem 0 is a str"),
        (
            dict(problems=[PROBLEMS[0], Problem(("the cat sits",), "who sits")]),
            "problem 1 has 0 answers and problem 0 1",
        ),
        (dict(methods=[]), "methods is empty"),
        (dict(metrics=["speed"]), "there is no metric 'speed'; there are accuracy, f1"),
        (dict(metrics="kl"), "metrics must be a list"),
        (
            dict(problems=[Problem(("the cat sits",), "who sits")], metrics=["kl", "accuracy"]),
            "'accuracy' needs answers: give them",
        ),
        (
            dict(methods={"a": Arm(LegoLink(1), "keep"), "b": LegoLink(1)}),
            "arm 'a' keeps the BOS of its chunks in the prompt and arm 'b' does not",
        ),
        (dict(methods=arms("repo")), "arms of one comparison share their ids"),
        (
            dict(problems=[Problem(("the cat",), "who", ("a b c", "a b c d"))], new_tokens=2),
            "the answers of problem 0 have 3 tokens or more and new_tokens is 2",
        ),
        (dict(methods=[LegoLink(1), LegoLink(1)]), r"two arms are named 'LegoLink\(k=1\)'"),
        (dict(methods={FULL: LegoLink(1)}), "two arms are named 'full'"),
        (dict(methods=[Arm(LegoLink(1), flops_per_byte=1.0)]), "leave out flops_per_byte"),
        (dict(methods={FULL: FullRecompute()}), "methods is empty"),
        (dict(methods=[LegoLink]), "is no link method"),
        (dict(methods=LegoLink(1)), "methods must be a list"),
        (dict(together=0), "whole number of problems together, got 0"),
        (
            dict(metrics=["first_token_seconds"], together=2),
            "'first_token_seconds' is of a prompt linked alone",
        ),
        (dict(workers=2, pic=object()), "workers=2 and a pic are given"),
        (dict(workers=2, metrics=["first_token_seconds"]), "leave out together and workers"),
        (dict(new_tokens=0), "whole number of new_tokens, got 0"),
        (dict(new_tokens=10_000), "positions: give fewer or shorter documents"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    model, monkeypatch, arguments, message
):
    monkeypatch.setattr(model, "forward", None)  # nothing may run
    given = dict(problems=PROBLEMS, methods=[NaiveReuse()]) | arguments
    with pytest.raises(PICacheError, match=message):
        compare(model, tokenizer_of(), progress=False, **given)


def test_workers_are_not_sent_a_model_that_is_not_on_the_cpu():
    there = tiny_model("llama").to("meta")
    with pytest.raises(PICacheError, match="workers=2 would copy a model on meta into every"):
        compare(there, tokenizer_of(), PROBLEMS, [NaiveReuse()], workers=2, progress=False)


def test_other_ids_are_no_comparison(model):
    arms = [NaiveReuse(), Arm(NaiveReuse(), "keep")]
    tokenizer = tokenizer_of()
    problem = Problem(("<s> the cat sits", "<s> the dog sleeps"), "who sits", ("cat",))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", None, [("<s>", 0)]
    )
    with pytest.raises(PICacheError, match="arms of one comparison share their ids"):
        compare(model, tokenizer, [problem], arms, progress=False)


def test_full_prefill_answers_as_the_model_does_on_its_own():
    """By `generate`, from the whole prompt as one text; no PIC in sight."""
    model, tokenizer = tiny_model("llama"), tokenizer_of()
    with torch.no_grad():  # only words are ever answered
        model.lm_head.weight[[0, 1, *range(len(tokenizer), 128)]] = 0.0
    answered = []
    for problem in PROBLEMS:
        text = " ".join([problem.question, problem.lead])
        prompt = "".join(["<s> ", *(f"{d}\n" for d in problem.documents), text])
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        answered.append(tokenizer.decode(out[0, ids.shape[1] :]))
    right = [replace(p, answers=(a,)) for p, a in zip(PROBLEMS, answered, strict=True)]
    result = compare(model, tokenizer, right, [NaiveReuse()], new_tokens=3, progress=False)
    assert result[FULL]["accuracy"].estimate == 1.0
    assert result[FULL]["f1"].estimate == 1.0
    assert len(set(answered)) > 1


def test_what_two_problems_share_is_compiled_once(model, monkeypatch):
    calls = []
    prefill = HFModel.prefill
    monkeypatch.setattr(HFModel, "prefill", lambda *a, **k: calls.append(1) or prefill(*a, **k))
    one = Problem(("the cat sits", "the dog sleeps"), "who sits", ("cat",))
    two = Problem(("the dog sleeps", "a bird sings"), "who sings", ("bird",))
    arms = [NaiveReuse(), LegoLink(2), Arm(LegoLink(2), DummySinks(2))]
    PIC(model)
    begun = len(calls)
    result = compare(model, tokenizer_of(), [one, two], arms, progress=False)
    # A PIC's own check, a BOS that stands first, and three documents: alone, and behind dummies.
    assert len(calls) - begun == begun + 1 + 3 + 3
    kept = module("picache.arms_linker")
    monkeypatch.setattr(kept, "KEPT", 0)
    begun_again = len(calls)
    again = compare(model, tokenizer_of(), [one, two], arms, progress=False)
    assert len(calls) - begun_again == begun + 2 * (1 + 2 + 2)
    for arm in result:
        for metric in set(METRICS) - {"first_token_seconds"}:
            np.testing.assert_array_equal(result.measured[arm][metric], again.measured[arm][metric])


def test_the_chunks_of_a_pic_that_is_handed_in_stay(model, monkeypatch, tmp_path):
    monkeypatch.setattr(module("picache.arms_linker"), "KEPT", 0)
    tokenizer = tokenizer_of()
    pic = PIC(model, tokenizer, store=ChunkStore(path=tmp_path), flops_per_byte=None)
    chunk = pic.compile("the bird sings")
    pic.store.pin(chunk.key)
    for together in (1, 2):
        compare(model, tokenizer, PROBLEMS, [NaiveReuse()], together=together, pic=pic,
                progress=False)  # fmt: skip
        assert chunk.key in pic.store
    assert len(pic.store) > 1


def test_how_a_pics_store_keeps_chunks_is_said(model):
    tokenizer = tokenizer_of()
    pic = PIC(model, tokenizer, store=ChunkStore(storage="int8"), flops_per_byte=None)
    result = compare(model, tokenizer, PROBLEMS, [NaiveReuse()], pic=pic, progress=False)
    assert result.settings["storage"] == "int8"
    assert compare(
        model, tokenizer, PROBLEMS, [NaiveReuse()], progress=False
    ).settings["storage"] == "exact"  # fmt: skip


def test_a_pic_whose_chunks_stand_behind_something_is_refused(model):
    tokenizer = tokenizer_of()
    pic = PIC(model, tokenizer, sinks=DummySinks(2), flops_per_byte=None)
    with pytest.raises(PICacheError, match="arms say themselves"):
        compare(model, tokenizer, PROBLEMS, [NaiveReuse()], pic=pic, progress=False)


@dataclass(frozen=True)
class Refuses(LinkMethod):
    def recompute(self, layout, evidence):
        raise PICacheError("not with this model: use another")


@pytest.mark.parametrize("captures", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
def test_problems_together_measure_what_each_does_alone(model, request, template, captures):
    """Padded: the problems differ in length, their answers too, and the last group is smaller."""
    if captures:
        request.getfixturevalue("captured")
    longer = Problem(("the dog sits", "the cat sleeps on a mat"), "where", ("on a mat", "mat"))
    problems, tokenizer = [*PROBLEMS, longer, PROBLEMS[1]], tokenizer_of(template)
    arms = {
        "naive": NaiveReuse(),
        "first tokens": Arm(LegoLink(2), DummySinks(2)),
        "by layer": CacheBlend(0.5),
        "asked": ProphetKV(0.3),
        "side by side": Arm(APE(), SharedPrefix("the cat")),
    }
    given = dict(new_tokens=4, progress=False)
    alone = compare(model, tokenizer, problems, arms, **given)
    pic = PIC(model, tokenizer, flops_per_byte=None)
    together = compare(model, tokenizer, problems, arms, together=2, pic=pic, **given)
    assert together.settings["prompt_tokens"] == alone.settings["prompt_tokens"]
    assert together.settings["decoded"] == alone.settings["decoded"]
    assert list(together[FULL]) == [name for name in METRICS if name != "first_token_seconds"]
    for arm, of in together.measured.items():
        for metric, measured in of.items():
            np.testing.assert_allclose(measured, alone.measured[arm][metric], rtol=0, atol=2e-5)


def test_a_group_measures_to_the_bit_what_it_does_without_those_before(model):
    """As a worker does that did not work on them: nothing compiled beside others is left."""
    shared = "the cat sits on the mat where a b c d"
    problems = [
        Problem((shared, "e f"), "where is the cat", ("on the mat",)),
        Problem(("the dog sleeps on a roof e f a b c d e f", "d e"), "who sleeps", ("the dog",)),
        Problem((shared, "the bird sings on the roof a b c d e"), "who sings", ("the bird",)),
        Problem(("f", "e d c b a"), "who", ("the bird",)),
        Problem((shared, "f e d"), "who is where", ("the cat",)),
    ]
    metrics = ["nll", "extra_nll", "kl"]
    given = dict(new_tokens=3, metrics=metrics, progress=False, together=2)
    ways = [NaiveReuse(), LegoLink(2)]
    whole = compare(model, tokenizer_of(), problems, ways, **given)
    for start in (2, 4):
        group = compare(model, tokenizer_of(), problems[start : start + 2], ways, **given)
        for arm, of in group.measured.items():
            for metric in metrics:
                found = whole.measured[arm][metric][start : start + 2]
                assert found.tolist() == of[metric].tolist(), (arm, metric)


def test_a_pic_is_used_again_with_what_it_has_compiled(model, monkeypatch):
    tokenizer = tokenizer_of()
    pic = PIC(model, tokenizer, flops_per_byte=None)
    first = compare(model, tokenizer, PROBLEMS, [LegoLink(2)], progress=False, pic=pic)
    monkeypatch.setattr(HFModel, "prefill", None)  # nothing is compiled again
    again = compare(model, tokenizer, PROBLEMS, [LegoLink(2)], progress=False, pic=pic)
    np.testing.assert_array_equal(
        first.measured["LegoLink(k=2)"]["kl"], again.measured["LegoLink(k=2)"]["kl"]
    )


def test_a_pic_that_links_something_else_is_refused(model):
    tokenizer = tokenizer_of()
    with pytest.raises(PICacheError, match="of another model or tokenizer"):
        compare(model, tokenizer, PROBLEMS, [LegoLink(2)], pic=PIC(model))
    with pytest.raises(PICacheError, match=r"flops_per_byte=25\.0, by which it would prefill"):
        compare(model, tokenizer, PROBLEMS, [LegoLink(2)], pic=PIC(model, tokenizer))


def test_a_method_that_refuses_is_named_with_the_problem(model):
    with pytest.raises(PICacheError, match=r"arm 'mine' on problem 0: not with this model"):
        compare(model, tokenizer_of(), PROBLEMS, {"mine": Refuses()}, progress=False)
    with pytest.raises(PICacheError, match=r"arm 'mine' on problems 0 to 1: not with this model"):
        compare(model, tokenizer_of(), PROBLEMS, {"mine": Refuses()}, progress=False, together=2)
    arms = {"good": NaiveReuse(), "bad": Arm(NaiveReuse(), DummySinks(2, token=999))}
    with pytest.raises(PICacheError, match="arm 'bad': DummySinks holds token id 999"):
        compare(model, tokenizer_of(), PROBLEMS, arms, progress=False)


def test_positions_are_those_of_the_text_part_of_a_composite_model(monkeypatch):
    """Gemma 3 keeps its positions in text_config; its own configuration names none."""
    model = tiny_model("llama")
    inner = model.config
    outer = SimpleNamespace(get_text_config=lambda decoder: inner)
    monkeypatch.setattr(model, "config", outer)
    with pytest.raises(PICacheError, match=f"the model has {inner.max_position_embeddings} posit"):
        compare(model, tokenizer_of(), PROBLEMS, [NaiveReuse()], progress=False, new_tokens=10**6)


def test_a_prompt_that_just_fits_is_not_refused():
    """Special tokens that the tokenizer adds to every piece are left out, so are not counted."""
    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A <unk>", None, [("<s>", 0), ("<unk>", 1)]
    )
    problem = Problem(("the cat sits", "the dog sits", "a bird sings"), "who", ("cat",))
    model = tiny_model("llama")
    fits = model.config.max_position_embeddings - (1 + 3 * 3 + 1)
    check = module("picache.compare")._check_lengths
    check(model, tokenizer, [problem], fits)
    with pytest.raises(PICacheError, match="problem 0 needs"):
        check(model, tokenizer, [problem], fits + 1)


def test_answers_are_read_as_squad_reads_them():
    assert begins("The cat, on a mat", "cat on mat") == 1.0
    assert begins("No, the cat", "cat") == 0.0
    assert f1("the cat sat", "cat") == pytest.approx(2 / 3)
    assert f1("dog", "cat") == 0.0
    assert begins("B. because", "A") == 0.0  # one of several choices is no article
    assert begins("A, because", "A") == 1.0
    assert begins("the", "A") == 0.0
    assert begins("? well", "?") == 1.0
    assert begins("well", "?") == 0.0
    # Without articles and punctuation nothing is left of these; they are no answer to everything.
    assert [begins(said, "A") for said in ("a", "A) mat", "cat", "")] == [1.0, 1.0, 0.0, 0.0]
    assert begins("+", "+") == f1("+", "+") == 1.0
    assert begins("-", "+") == f1("-", "+") == f1("cat", "A") == 0.0
