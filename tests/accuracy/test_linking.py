"""What linking loses on a real model, in the order that EPIC's picture says.

Run it on a model of your own: ``pytest tests/accuracy --kv-model Qwen/Qwen3-0.6B``.
"""

import pytest

from picache import Arm, DummySinks, LegoLink, NaiveReuse, compare
from picache.testing import assert_within

pytestmark = [pytest.mark.model, pytest.mark.slow]

BEHIND_DUMMIES = "LegoLink-4 behind dummies"


@pytest.fixture(scope="session")
def linked(kv_model, kv_tokenizer, link_problems):
    methods = {"naive": NaiveReuse(), BEHIND_DUMMIES: Arm(LegoLink(4), DummySinks(4))}
    return compare(kv_model, kv_tokenizer, link_problems, methods, new_tokens=3)


def test_full_prefill_answers_so_that_there_is_something_to_lose(linked):
    assert linked["full"]["accuracy"].low > 0.25, str(linked)


def test_full_prefill_finds_the_answer_likelier_than_legolink_does(linked):
    assert_within(linked, "full", of=BEHIND_DUMMIES, by=-0.25, metric="extra_nll")


def test_legolink_behind_dummies_finds_the_answer_likelier_than_naive_reuse_does(linked):
    assert_within(linked, BEHIND_DUMMIES, of="naive", by=-0.5, metric="extra_nll")


def test_legolink_behind_dummies_is_nearer_to_full_prefill_than_naive_reuse_is(linked):
    assert_within(linked, BEHIND_DUMMIES, of="naive", by=-0.25, metric="kl")


def test_naive_reuse_loses_right_answers(linked):
    assert_within(linked, "full", of="naive", by=-0.25)


def test_legolink_behind_dummies_does_not_keep_all_of_them(linked):
    assert_within(linked, "full", of=BEHIND_DUMMIES, by=-0.01)


def test_most_of_the_prompt_is_reused(linked):
    assert linked[BEHIND_DUMMIES]["recomputed"].high < 0.2, str(linked)
