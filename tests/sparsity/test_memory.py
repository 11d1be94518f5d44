"""Bytes are measured, and bounded for policies that evict."""

import pytest
import torch

from sparsity import H2O, RKV, Full, Quest, RaaS, SparseCache
from tests.helpers import random_ids, tiny_model
from tests.sparsity.zoo import AMPLE, TIGHT

HEADS, DIM, LAYERS = 2, 16, 4


def storages(cache):
    """Bytes of every distinct storage reachable from the cache, found without its own report."""
    seen = {}

    def walk(thing, done):
        if id(thing) in done or isinstance(thing, torch.nn.Module):  # a module is the model's
            return
        done.add(id(thing))
        if isinstance(thing, torch.Tensor):
            seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            for value in thing.values():
                walk(value, done)
        elif isinstance(thing, (list, tuple)):
            for value in thing:
                walk(value, done)
        elif hasattr(thing, "__dict__"):
            walk(vars(thing), done)

    walk(cache.layers, set())
    return sum(seen.values())


def kv_bytes(tokens, layers=LAYERS):
    return tokens * HEADS * DIM * 2 * 4 * layers


ONE_BUDGET = [p for p in AMPLE if p.evicts and not p.pin_prompt and not hasattr(p, "beta")]
ONE_BUDGET = [p for p in ONE_BUDGET if p.pages_kept == p.budget // p.page_size]


@pytest.mark.parametrize("policy", ONE_BUDGET, ids=str)
def test_a_long_prompt_is_freed(policy, llama):
    cache = SparseCache(llama, policy)
    with torch.no_grad():
        llama(input_ids=random_ids(256, 1), past_key_values=cache)
    report = cache.report()
    assert report.num_bytes == storages(cache)
    assert report.tokens_kept == (policy.budget,) * LAYERS
    held = policy.budget + (policy.evict_every or 1) - 1
    queries = policy.needs.window * 4 * DIM * 4 * LAYERS
    assert kv_bytes(policy.budget) <= report.num_bytes - queries <= 1.35 * kv_bytes(held)
    assert report.evictions == ((256 - policy.budget) * HEADS,) * LAYERS
    assert report.peak_bytes >= kv_bytes(256) / LAYERS
    assert f"{policy.budget} tokens kept" in str(report)


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_every_byte_is_counted(policy, llama):
    cache = SparseCache(llama, policy)
    llama.generate(random_ids(13, 2), max_new_tokens=14, past_key_values=cache)
    assert cache.report().num_bytes == storages(cache)
    cache.batch_select_indices(torch.arange(2))  # forgets what the last step attended to
    single = cache.report().num_bytes
    cache.batch_repeat_interleave(2)
    assert cache.report().num_bytes == 2 * single == storages(cache)


@pytest.mark.parametrize("policy", [Full(), Quest(64)], ids=str)
def test_policies_that_keep_everything(policy, llama):
    cache = SparseCache(llama, policy)
    llama.generate(random_ids(100, 1), max_new_tokens=101, past_key_values=cache)
    report = cache.report()
    assert report.num_bytes == storages(cache)
    assert report.tokens_kept == (200,) * LAYERS
    assert report.evictions == (0,) * LAYERS
    assert kv_bytes(200) <= report.num_bytes <= 1.6 * kv_bytes(200)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "decoded"),
    [
        (RaaS(64, page_size=16), 8192),
        (H2O(64, evict_every=8), 2048),
        (RKV(64, evict_every=32), 2048),
    ],
    ids=["RaaS-8192", "H2O-2048", "RKV-2048"],
)
def test_the_same_bytes_however_long_the_text(policy, decoded):
    model = tiny_model("llama", num_hidden_layers=1)
    cache = SparseCache(model, policy)
    ids, held = random_ids(20, 1), set()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        places = [layer.keys.data_ptr() for layer in cache.layers]
        for i in range(decoded):
            position = torch.tensor([[cache.get_seq_length() % 400]])
            out = model(input_ids=ids[:, :1], position_ids=position, past_key_values=cache)
            if i % 64 == 0:
                held.add(cache.report().num_bytes)
    assert out.logits.isfinite().all()
    report = cache.report()
    assert held == {report.num_bytes} == {storages(cache)}
    assert [layer.keys.data_ptr() for layer in cache.layers] == places  # used again in place
    assert report.num_bytes <= 1.3 * kv_bytes(64 + policy.evict_every - 1, layers=1)
    assert report.tokens_seen == 20 + decoded
    assert max(report.tokens_kept) <= 64 + policy.evict_every - 1
