"""What dropping KV loses on a real model and real text, in the order that the papers say."""

import pytest

from picache.testing import assert_within
from sparsity import Quest, Random, StreamingLLM, compare

pytestmark = [pytest.mark.model, pytest.mark.slow]

# Of a text, at a token a step; of these the prompt; and what a policy may keep of all.
TOKENS, PROMPT, BUDGET = 112, 32, 48


@pytest.fixture(scope="session")
def retained(kv_model, kv_tokenizer, reasoning_texts):
    ids = [kv_tokenizer(text)["input_ids"][:TOKENS] for text in reasoning_texts]
    texts = [kv_tokenizer.decode(tokens, skip_special_tokens=True) for tokens in ids]
    policies = {
        "Quest": Quest(BUDGET),
        "StreamingLLM": StreamingLLM(BUDGET),
        "random": Random(BUDGET, pin_prompt=False),
    }
    return compare(
        kv_model, kv_tokenizer, texts, policies, prompt_tokens=PROMPT, batch_size=len(texts)
    )


def test_quest_loses_little(retained):
    assert_within(retained, "Quest", of="dense", by=0.25, metric="extra_nll")


def test_sinks_and_what_is_recent_are_worth_more_than_random_tokens(retained):
    assert_within(retained, "StreamingLLM", of="random", by=-0.2, metric="extra_nll")


def test_pages_chosen_by_the_query_are_worth_more_than_random_tokens(retained):
    assert_within(retained, "Quest", of="random", by=-0.2, metric="extra_nll")


def test_streaming_holds_a_part_of_what_dense_holds(retained):
    assert_within(retained, "StreamingLLM", by=0.0, metric="kept_bytes")
    assert retained["StreamingLLM"]["kept_bytes"].high < 0.6 * retained["dense"]["kept_bytes"].low
