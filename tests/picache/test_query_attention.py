"""How much a query attends to each token, from a captured pass: what the eager pass finds."""

import pytest
import torch

from picache import A3, Combined, LegoLink, ProphetKV
from picache.hf import captured_pass, padded_pass
from picache.hf.captured_pass import CapturedPasses
from picache.hf.model import HFModel
from picache.hf.sparse_pass import CannotCapture, Question
from picache.linking.measured_evidence import MeasuredEvidence
from tests.helpers import CONFIGS, tiny_model
from tests.picache.captured import TAKEN, assert_same, families, pic_and_parts

METHODS = [A3(0.3), ProphetKV(0.3), ProphetKV(0.3, value_norm=True)]


@pytest.fixture
def asked(monkeypatch):
    """What every row of every link was answered."""
    answers = []
    own = MeasuredEvidence.query_attention

    def query_attention(self, layers=None, value_norm=False):
        answers.append(own(self, layers, value_norm))
        return answers[-1]

    monkeypatch.setattr(MeasuredEvidence, "query_attention", query_attention)
    return answers


@pytest.fixture
def not_eagerly(monkeypatch):
    def refused(*args):
        raise AssertionError("the query was run eagerly")

    def do():
        monkeypatch.setattr(HFModel, "attention_masses", refused)

    return do


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("family", TAKEN)
def test_every_family_is_answered_as_eagerly(family, method, captured, eagerly, asked, not_eagerly):
    try:
        model = families.build(family)
    except AttributeError as error:
        pytest.skip(f"this transformers has no such family: {error}")
    pic, chunks, query = pic_and_parts(model)
    expected = eagerly(pic, chunks, query, method)
    not_eagerly()
    prompt = pic.link(chunks, query, method)
    assert prompt.report.recompute_pass.startswith("captured")
    theirs, ours = asked
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert_same(prompt, expected)
    assert prompt.report.flops == expected.report.flops


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_one_pass_answers_all_rows_of_a_batch(
    method, captured, eagerly, asked, not_eagerly, monkeypatch
):
    pic, chunks, query = pic_and_parts(tiny_model("gemma3"))
    rows, queries = [chunks, chunks[:2], chunks[2:]], [query, query[:3], query[:1]]
    expected = eagerly(pic, rows, queries, method)
    passes, masses = [], CapturedPasses.masses
    monkeypatch.setattr(
        CapturedPasses, "masses", lambda self, *given: passes.append(given) or masses(self, *given)
    )
    not_eagerly()
    prompt = pic.link(rows, queries, method)
    assert len(passes) == 1
    for ours, theirs in zip(asked[3:], asked[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert_same(prompt, expected)
    assert [one.flops for one in prompt.reports] == [one.flops for one in expected.reports]


def test_a_pass_runs_the_layers_that_are_asked_for(captured, monkeypatch):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    attended, own = [], padded_pass.ObservingPass.observe
    monkeypatch.setattr(
        padded_pass.ObservingPass, "observe",
        lambda self, *given: attended.append(1) or own(self, *given),
    )  # fmt: skip
    pic.link(chunks, query, A3(0.3))
    first = len(attended)
    pic.link(chunks, query, ProphetKV(0.3))
    assert len(attended) - first == 4 * first  # of four layers


def test_what_was_asked_once_is_not_run_again(captured, asked, not_eagerly):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    not_eagerly()
    for _ in range(2):
        pic.link(chunks, query, Combined((LegoLink(1), ProphetKV(0.3))))
    questions = {size[2] for size in pic.passes._recorded}
    assert questions == {None, Question(4, False)}
    first = pic.link(chunks, query, A3(0.3)).report.seconds
    again = pic.link(chunks, query, A3(0.3)).report.seconds
    assert first["capture"] > 0
    assert again["capture"] == 0
    assert first["choose"] >= 0


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_where_no_pass_is_captured_the_query_runs_eagerly(method, captured, eagerly, monkeypatch):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    expected = eagerly(pic, chunks, query, method)

    def fails(*args):
        raise CannotCapture("no memory")

    monkeypatch.setattr(CapturedPasses, "masses", fails)
    assert_same(pic.link(chunks, query, method), expected)
    pic.passes.forget()
    monkeypatch.setattr(captured_pass, "MOST_ROWS", 4)
    prompt = pic.link(chunks, query, method)
    assert "too much memory in a graph" in prompt.report.recompute_pass
    assert_same(prompt, expected)


@pytest.mark.parametrize("family", CONFIGS)
def test_half_precision_chooses_from_numbers_as_good_as_the_eager_ones(
    family, captured, eagerly, asked
):
    reference = pic_and_parts(tiny_model(family))
    eagerly(*reference, ProphetKV(0.3))
    halves = pic_and_parts(tiny_model(family, dtype=torch.bfloat16))
    eagerly(*halves, ProphetKV(0.3))
    halves[0].link(*halves[1:], ProphetKV(0.3))
    exact, theirs, ours = asked
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()
