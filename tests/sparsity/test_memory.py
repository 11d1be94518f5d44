"""Bytes are measured, and bounded for policies that evict."""

import pytest
import torch

from sparsity import Full, Quest, RaaS, Random, SparseCache, StreamingLLM
from tests.helpers import random_ids

HEADS, DIM, LAYERS = 2, 16, 4


def storages(cache):
    """Bytes of every distinct storage reachable from the cache, found without its own report."""
    seen = {}

    def walk(thing, done):
        if id(thing) in done:
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


def kv_bytes(tokens):
    return tokens * HEADS * DIM * 2 * 4 * LAYERS


@pytest.mark.parametrize(
    "policy", [StreamingLLM(64), Random(64, pin_prompt=False), RaaS(64, pin_prompt=False)], ids=str
)
def test_a_long_prompt_is_freed(policy, llama):
    cache = SparseCache(llama, policy)
    with torch.no_grad():
        llama(input_ids=random_ids(512, 1), past_key_values=cache)
    report = cache.report()
    assert report.num_bytes == storages(cache)
    assert report.tokens_kept == (64,) * LAYERS
    assert kv_bytes(64) <= report.num_bytes <= 1.2 * kv_bytes(64)
    assert report.evictions == ((512 - 64) * HEADS,) * LAYERS
    assert report.peak_bytes >= kv_bytes(512) / LAYERS
    assert "64 tokens kept" in str(report)


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
def test_raas_holds_the_same_bytes_over_thousands_of_tokens(llama):
    cache = SparseCache(llama, RaaS(64, page_size=16))
    ids, held = random_ids(20, 1), []
    with torch.no_grad():
        llama(input_ids=ids, past_key_values=cache)
        for _ in range(3000):
            position = torch.tensor([[cache.get_seq_length() % 400]])
            out = llama(input_ids=ids[:, :1], position_ids=position, past_key_values=cache)
            held.append(cache.report().num_bytes if len(held) % 50 == 49 else 0)
    assert out.logits.isfinite().all()
    flat = {num_bytes for num_bytes in held[49:] if num_bytes}
    assert len(flat) == 1
    assert flat.pop() == storages(cache) <= 1.2 * kv_bytes(64)
    assert cache.report().peak_bytes == max(held)
    assert cache.report().tokens_seen == 3020
