"""Bytes are measured, and bounded for policies that evict."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from sparsity import (
    H2O,
    RKV,
    Full,
    LazyEviction,
    Quest,
    QuestRaaS,
    RaaS,
    SnapKV,
    SparseCache,
    StreamingLLM,
    Then,
)
from sparsity.retention import page_pool
from sparsity.retention.all_layers import AllLayers
from tests.helpers import random_ids, tiny_model
from tests.sparsity.helpers import DrivenLayer, padded_ids
from tests.sparsity.zoo import AMPLE, TIGHT

HEADS, DIM, LAYERS = 2, 16, 4


def storages(cache):
    """Bytes of every distinct storage reachable from the cache, found without its own report."""
    seen = {}

    def walk(thing, done):
        if id(thing) in done or isinstance(thing, torch.nn.Module | AllLayers):
            return  # the model's; ids and counters of the whole cache, which are of no layer
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
        for i in range(decoded):
            position = torch.tensor([[cache.get_seq_length() % 400]])
            out = model(input_ids=ids[:, :1], position_ids=position, past_key_values=cache)
            if i == 128:  # the budget is full
                places = [layer.keys.data_ptr() for layer in cache.layers]
            if i % 64 == 0 and i >= 128:
                held.add(cache.report().num_bytes)
    assert out.logits.isfinite().all()
    report = cache.report()
    assert held == {report.num_bytes} == {storages(cache)}
    assert [layer.keys.data_ptr() for layer in cache.layers] == places  # used again in place
    assert report.num_bytes <= 1.3 * kv_bytes(64 + policy.evict_every - 1, layers=1)
    assert report.tokens_seen == 20 + decoded
    assert max(report.tokens_kept) <= 64 + policy.evict_every - 1


ROOMY = [
    RaaS(1024),
    Quest(1024),
    H2O(1024),
    StreamingLLM(1024),
    SnapKV(1024, evict_every=128),
    RKV(1024),
    LazyEviction(1024),
    QuestRaaS(1024),
    Then(SnapKV(512, page_size=16), RaaS(1024)),
    Full(),
]


@pytest.mark.parametrize("policy", ROOMY, ids=str)
def test_a_budget_far_above_the_text_costs_no_more_than_the_text(policy):
    """Places grow with the text: at most an eighth over it, and what the policy notes of a page."""
    layer, generator = DrivenLayer(policy, move=lambda keys, *_: keys), torch.Generator()
    generator.manual_seed(0)
    length, moves, before = 0, 0, None
    for width in [40] + [1] * 360:
        query = torch.randn(1, 4, width, 64, generator=generator)
        key = torch.randn(1, 2, width, 64, generator=generator)
        layer.forward(query, key, key.clone())
        length += width
        pool = layer.pool
        moves += pool.keys.data_ptr() != before
        before = pool.keys.data_ptr()
        tokens = pool.keys.shape[2]
        assert length <= tokens <= length + max(length / page_pool.SHARE, 16) + policy.page_size
        one = 2 * 64 * 2 * 4  # bytes of a token: two heads of 64 keys and values
        noted = pool.queries.nbytes + pool.asked.nbytes
        assert layer.retention.num_bytes - noted <= 1.13 * one * tokens
    assert moves <= 2 + 360 / 16  # and are not copied at every step


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_places_never_exceed_what_the_policy_holds(data):
    """In batches with padding and with forwards of several tokens in between, at any budget."""
    size = data.draw(st.integers(1, 5))
    budget = size * data.draw(st.integers(4, 30))
    policy = data.draw(
        st.sampled_from(
            [
                H2O(budget, size, recent=1, evict_every=size * data.draw(st.integers(1, 4))),
                RaaS(budget, page_size=size, pin_prompt=False),
                SnapKV(budget, page_size=size, window=2, recent=0),
            ]
        )
    )
    widths = data.draw(st.lists(st.sampled_from([1, 1, 1, 1, 1, 1, 4, 9]), min_size=40))
    pads = data.draw(st.sampled_from([(0,), (0, 0), (3, 0)]))
    widths = [7, *widths]
    _, mask = padded_ids(sum(widths), *pads)
    layer, length = DrivenLayer(policy), 0
    for width in widths:
        query, key = torch.randn(len(pads), 2, width, 4), torch.randn(len(pads), 1, width, 4)
        length += width
        layer.forward(query, key, key, mask[:, :length] if any(pads) else None)
        places, longest = layer.pool.start.shape[-1], -(-length // size)
        if policy.pages_held is not None:
            assert places <= max(policy.pages_held, policy.pages_kept)
        assert places <= longest + max(longest / page_pool.SHARE, 16 / size + 1)


def test_the_peak_is_of_the_cache_and_not_of_the_one_it_goes_on_from(llama):
    past, ids = DynamicCache(config=llama.config), random_ids(203, 1)
    with torch.no_grad():
        llama(input_ids=ids[:, :200], past_key_values=past)
    cache = SparseCache(llama, H2O(32), past=past)
    report = cache.report()
    assert (report.num_bytes, report.peak_bytes) == (0, 0)
    assert report.past_bytes == kv_bytes(200)
    assert report.tokens_kept == (200,) * LAYERS
    with torch.no_grad():
        llama(input_ids=ids[:, 200:], past_key_values=cache)
    report = cache.report()
    assert report.num_bytes == storages(cache)
    assert report.peak_bytes == report.num_bytes + kv_bytes(203) / LAYERS  # one layer at a time
    assert report.past_bytes == kv_bytes(200) > report.peak_bytes
    assert f"besides {kv_bytes(200):,} of the cache it went on from" in str(report)
    cache.reset()
    report = cache.report()
    assert (report.num_bytes, report.peak_bytes, report.past_bytes) == (0, 0, 0)
    assert "besides" not in str(report)


def test_rows_copied_from_the_cache_gone_on_from_are_the_sparse_caches_own(llama):
    past, ids = DynamicCache(config=llama.config), random_ids(102, 1)
    with torch.no_grad():
        llama(input_ids=ids[:, :100], past_key_values=past)
        cache = SparseCache(llama, H2O(32), past=past)
        llama(input_ids=ids[:, 100:].repeat(3, 1), past_key_values=cache)
    report = cache.report()
    assert report.peak_bytes == 3 * kv_bytes(100)
    assert report.past_bytes == kv_bytes(100)


def test_a_window_taken_from_another_cache_is_the_sparse_caches_own():
    model = tiny_model("gemma3")
    past, ids = DynamicCache(config=model.config), random_ids(42, 1)
    with torch.no_grad():
        model(input_ids=ids[:, :40], past_key_values=past)
    cache = SparseCache(model, H2O(16), past=past)
    report = cache.report()
    assert report.peak_bytes == report.num_bytes > 0
    full = [layer for i, layer in enumerate(past.layers) if i in cache.retentions]
    assert report.past_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in full)


def test_no_more_is_held_than_at_the_peak(llama):
    cache = SparseCache(llama, RaaS(64))
    with torch.no_grad():
        llama(input_ids=random_ids(40, 1), past_key_values=cache)
        for _ in range(3):
            cache.batch_repeat_interleave(2)
            report = cache.report()
            assert report.num_bytes <= report.peak_bytes
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.report().peak_bytes == report.peak_bytes


def test_places_that_become_more_count_with_those_there_were(llama):
    cache, ids = SparseCache(llama, Full(page_size=1)), random_ids(33, 1)
    with torch.no_grad():
        llama(input_ids=ids[:, :32], past_key_values=cache)
        before = cache.report()
        llama(input_ids=ids[:, 32:], past_key_values=cache)
    report = cache.report()
    assert report.num_bytes > before.num_bytes
    assert report.peak_bytes == report.num_bytes + kv_bytes(32) / LAYERS
