"""Going on from what others prefilled: a linked prompt, and a prefix that many requests share."""

import pytest
import torch
from transformers import DynamicCache

from picache import PIC, FullRecompute, LegoLink
from sparsity import SparseCache
from tests.helpers import random_ids
from tests.sparsity.zoo import AMPLE, TIGHT, asks_the_prompt, shallow_model

# Those whose choice rests on what a taken-over cache still has.
KNOWS = [policy for policy in TIGHT if not asks_the_prompt(policy)]
CHUNKS = [random_ids(length, seed=seed) for length, seed in ((6, 11), (5, 12), (4, 13))]
QUERY = random_ids(3, seed=14)


def generate(model, ids, cache):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=14,
        do_sample=False,
    )


def tensors(cache):
    return [(layer.keys, layer.values) for layer in cache.layers]


def copies(cache):
    return [(keys.clone(), values.clone()) for keys, values in tensors(cache)]


def assert_untouched(cache, before):
    for now, then in zip(tensors(cache), before, strict=True):
        assert torch.equal(now[0], then[0])
        assert torch.equal(now[1], then[1])


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def linked(request):
    """A model, and its prompts by method: linked once, used by every policy."""
    model = shallow_model(request.param)
    pic = PIC(model, flops_per_byte=0)
    chunks = [pic.compile(chunk) for chunk in CHUNKS]
    methods = {"exact": FullRecompute(), "linked": LegoLink(k=2)}
    return model, {name: pic.link(chunks, QUERY, method=m) for name, m in methods.items()}


@pytest.mark.parametrize("policy", AMPLE, ids=str)
def test_a_linked_prompt_and_an_ample_budget(policy, linked):
    """The tokens that dense decoding gives from the same prompt."""
    model, prompts = linked
    prompt = prompts["linked"]
    past = prompt["past_key_values"]
    before = copies(past)
    cache = SparseCache(model, policy, past=past)
    assert cache.get_seq_length() == past.get_seq_length() > 0
    got = generate(model, prompt["input_ids"], cache)
    assert_untouched(past, before)
    dense = DynamicCache()
    for i, (keys, values) in enumerate(before):
        dense.update(keys, values, i)
    assert torch.equal(got, generate(model, prompt["input_ids"], dense))


@pytest.mark.parametrize("policy", KNOWS, ids=str)
def test_a_linked_prompt_and_a_tight_budget(policy, linked):
    """Recomputed in full it is a prefill: the tokens of the policy from scratch."""
    model, prompts = linked
    prompt = prompts["exact"]
    cache = SparseCache(model, policy, past=prompt["past_key_values"])
    got = generate(model, prompt["input_ids"], cache)
    assert torch.equal(got, generate(model, prompt["input_ids"], SparseCache(model, policy)))
    assert cache.report().tokens_seen == prompt["input_ids"].shape[1] + 13


REQUESTS = [random_ids(length, 1, seed=20 + length) for length in (1, 5)]


CASES = [("llama", policy) for policy in (*AMPLE[::2], *KNOWS)]
CASES += [("gemma3", policy) for policy in (*AMPLE[::4], *KNOWS[::3])]


@pytest.mark.parametrize(("family", "policy"), CASES, ids=str)
def test_one_prefill_and_many_requests(family, policy):
    """Each goes on as if it were alone, from a prefix that no request writes to."""
    model = shallow_model(family)
    prefix, past = random_ids(14, 1), DynamicCache()
    with torch.no_grad():
        model(input_ids=prefix, past_key_values=past)
    before = copies(past)
    for request in REQUESTS:
        ids = torch.cat([prefix, request], 1)
        got = generate(model, ids, SparseCache(model, policy, past=past))
        expected = None if policy in AMPLE else SparseCache(model, policy)
        assert torch.equal(got, generate(model, ids, expected))
        assert_untouched(past, before)
    together = torch.cat([torch.cat([prefix, random_ids(3, 1, seed=s)], 1) for s in (31, 32)])
    got = generate(model, together, SparseCache(model, policy, past=past))
    expected = None if policy in AMPLE else SparseCache(model, policy)
    assert torch.equal(got, generate(model, together, expected))
    assert_untouched(past, before)
