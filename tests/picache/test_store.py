"""The store: bounded bytes, least recently used first, keys that tell models apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picache import PIC, ChunkStore, LegoLink, PICacheError
from tests.helpers import random_ids, tiny_model


def entry(nbytes):
    half = torch.zeros(nbytes // 2, dtype=torch.uint8)
    return [(half, half.clone())]


def test_the_least_recently_used_leaves_first():
    store = ChunkStore(device_bytes=100)
    store.put("a", entry(40))
    store.put("b", entry(40))
    assert store.get("a") is not None
    store.put("c", entry(40))
    assert ("a" in store, "b" in store, "c" in store) == (True, False, True)
    assert (store.nbytes, store.evictions, store.hits, store.misses) == (80, 1, 1, 0)


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 30)), max_size=40))
def test_bytes_are_what_is_held_and_never_over(puts):
    store, last = ChunkStore(device_bytes=64), {}
    for key, half in puts:
        store.put(key, entry(2 * half))
        last[key] = 2 * half
        assert store.nbytes == sum(last[k] for k in last if k in store)
        assert store.nbytes <= 64
        assert key in store


def test_a_chunk_larger_than_the_store_changes_nothing():
    store = ChunkStore(device_bytes=50)
    store.put("a", entry(40))
    with pytest.raises(PICacheError, match="60 bytes does not fit a store of 50"):
        store.put("b", entry(60))
    assert "a" in store
    assert store.nbytes == 40


def test_compiling_twice_is_a_hit_and_evicted_chunks_come_back():
    model = tiny_model("llama")
    one = PIC(model).compile(random_ids(20)).nbytes
    pic = PIC(model, store=ChunkStore(device_bytes=2 * one))
    documents = [random_ids(20, seed=s) for s in range(3)]
    chunks = [pic.compile(d) for d in documents]
    assert pic.store.evictions == 1
    hits = pic.store.hits
    assert pic.compile(documents[2]) == chunks[2]
    assert pic.store.hits == hits + 1
    prompt = pic.link(chunks, random_ids(3), LegoLink(2))
    assert (prompt.report.hits, prompt.report.misses) == (0, 3)  # each load evicts the next
    whole = PIC(model)
    expected = whole.link([whole.compile(d) for d in documents], random_ids(3), LegoLink(2))
    assert torch.equal(prompt.logits, expected.logits)
    assert pic.store.nbytes <= 2 * one


def test_a_stored_chunk_comes_back_to_the_bit_and_links_do_not_touch_it():
    pic = PIC(tiny_model("llama"))
    chunks = [pic.compile(random_ids(n, seed=n)) for n in (5, 12)]
    before = [[t.clone() for layer in pic.store.get(c.key) for t in layer] for c in chunks]
    pic.link(chunks, random_ids(4), LegoLink(12))
    after = [[t for layer in pic.store.get(c.key) for t in layer] for c in chunks]
    for mine, theirs in zip(before, after, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


def test_keys_tell_models_weights_and_dtypes_apart():
    ids = random_ids(8)
    keys = {
        PIC(tiny_model("llama")).compile(ids).key,
        PIC(tiny_model("llama", seed=1)).compile(ids).key,
        PIC(tiny_model("llama", dtype=torch.bfloat16)).compile(ids).key,
        PIC(tiny_model("qwen2")).compile(ids).key,
        PIC(tiny_model("llama")).compile(ids[:7]).key,
    }
    assert len(keys) == 5
    assert PIC(tiny_model("llama")).compile(ids).key in keys


def test_a_bound_must_be_positive():
    with pytest.raises(PICacheError, match="device_bytes must be positive, got 0"):
        ChunkStore(device_bytes=0)
