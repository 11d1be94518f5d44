"""The store: bounded tiers, what leaves first, and keys that tell models apart."""

import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import picache
from picache import PIC, ChunkStore, LegoLink, PICacheError
from picache.chunk import Header, chunk_key
from tests.helpers import random_ids, tiny_model
from tests.picache.helpers import chunks_of, compiled, same_kv


def entry(nbytes, seed=0):
    """A chunk of one layer, one head and `nbytes` bytes in all, a multiple of 8."""
    made = torch.Generator().manual_seed(seed)
    half = torch.randn(1, 1, nbytes // 8, 1, generator=made)
    return [(half, half + 1)]


def test_the_least_recently_used_leaves_first():
    store = ChunkStore(device_bytes=100)
    store.put("a", entry(40))
    store.put("b", entry(40))
    assert store.get("a") is not None
    store.put("c", entry(40))
    assert ("a" in store, "b" in store, "c" in store) == (True, False, True)
    assert (store.nbytes, store.evictions, store.hits, store.misses) == (80, 1, 1, 0)


class Model:
    """The tiers as a person would write them down: recency lists, oldest first."""

    def __init__(self, budgets):
        self.budgets, self.tiers = budgets, [OrderedDict() for _ in budgets]
        self.pinned = set()

    def fits(self, level, key, size):
        held = {k: s for k, s in self.tiers[level].items() if k in self.pinned and k != key}
        return size + sum(held.values()) <= self.budgets[level]

    def put(self, key, size, level=0):
        """False when there is no room; a chunk that must leave a tier goes to the next."""
        if level == len(self.tiers):
            return False
        elsewhere = key in self.pinned and key not in self.tiers[level]
        if elsewhere or not self.fits(level, key, size):
            return self.put(key, size, level + 1)
        for tier in self.tiers:
            tier.pop(key, None)
        tier, out = self.tiers[level], []
        while sum(tier.values()) + size > self.budgets[level]:
            oldest = next(k for k in tier if k not in self.pinned)
            out.append((oldest, tier.pop(oldest)))
        for victim in out:
            if level + 1 < len(self.tiers) and self.fits(level + 1, *victim):
                self.put(*victim, level + 1)
        tier[key] = size
        return True

    def get(self, key):
        for level, tier in enumerate(self.tiers):
            if key in tier:
                tier.move_to_end(key)
                return level
        return None


names = st.sampled_from("abcdef")
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), names, st.integers(1, 8)),
        st.tuples(st.just("get"), names, st.just(0)),
        st.tuples(st.just("pin"), names, st.just(0)),
        st.tuples(st.just("unpin"), names, st.just(0)),
    ),
    max_size=50,
)


@settings(max_examples=300, deadline=None)
@given(steps, st.sampled_from([(12,), (12, 9), (7, 30), (12, math.inf)]))
def test_the_tiers_do_what_a_person_would_write_down(steps, budgets):
    budgets = [8 * budget for budget in budgets]
    store, model, content = ChunkStore(*budgets), Model(budgets), {}
    for index, (what, key, size) in enumerate(steps):
        if what == "put":
            chunk = entry(8 * size, seed=index)
            if model.put(key, 8 * size):
                store.put(key, chunk)
                content[key] = chunk
            else:
                with pytest.raises(PICacheError, match="does not fit"):
                    store.put(key, chunk)
        elif what == "get":
            level, found = model.get(key), store.get(key)
            assert (found is None) == (level is None)
            if found is not None:
                assert found.tier == ("device", "host")[level]
                assert same_kv(found, content[key])
        elif what == "pin" and model.get(key) is not None:
            store.get(key)
            store.pin(key)
            model.pinned.add(key)
        elif what == "unpin" and key in model.pinned:
            store.unpin(key)
            model.pinned.remove(key)
        held = [(tier.chunks, tier.nbytes) for tier in store.stats().tiers]
        assert held == [(len(tier), sum(tier.values())) for tier in model.tiers]
        assert all(tier.nbytes <= tier.budget for tier in store.stats().tiers)
        assert all(key in store for key in model.pinned)


def test_put_leaves_a_pinned_chunk_where_it_is_pinned(tmp_path):
    store = ChunkStore(40, 40, tmp_path)
    for seed, key in enumerate("abc"):
        store.put(key, entry(40, seed))
    assert [store.get(key).tier for key in "abc"] == ["disk", "host", "device"]
    for seed, key in enumerate("ab"):
        store.pin(key)
        store.put(key, entry(40, seed))
    assert [store.get(key).tier for key in "abc"] == ["disk", "host", "device"]
    for key in "ab":
        store.unpin(key)
    store.put("a", entry(40, 0))
    assert [store.get(key).tier for key in "abc"] == ["device", "disk", "host"]


def test_a_chunk_larger_than_the_store_changes_nothing():
    store = ChunkStore(device_bytes=50)
    store.put("a", entry(40))
    with pytest.raises(PICacheError, match="64 bytes does not fit a store of 50"):
        store.put("b", entry(64))
    assert "a" in store
    assert store.nbytes == 40


def test_what_leaves_the_device_goes_to_host_then_to_disk_then_nowhere(tmp_path):
    on_file = len(_file_of(tmp_path / "probe"))
    store = ChunkStore(40, 40, tmp_path / "chunks", disk_bytes=3 * on_file)
    kept = {key: entry(40, seed) for seed, key in enumerate("abcd")}
    for key, kv in kept.items():
        store.put(key, kv)
    assert [key for key in "abcd" if key in store] == ["b", "c", "d"]
    assert [store.get(key).tier for key in "bcd"] == ["disk", "host", "device"]
    assert all(same_kv(store.get(key), kept[key]) for key in "bcd")
    assert (store.evictions, store.demotions, len(store)) == (1, 5, 3)
    assert "device 1 chunks" in repr(store)


def _file_of(path):
    ChunkStore(path=path).put("a", entry(40))
    (file,) = path.rglob("*.safetensors")
    return file.read_bytes()


def test_promote_brings_a_chunk_back_up(tmp_path):
    store = ChunkStore(40, 40, tmp_path)
    for seed, key in enumerate("abc"):
        store.put(key, entry(40, seed))
    assert [store.get(key).tier for key in "abc"] == ["disk", "host", "device"]
    assert store.promote("a", "cpu")
    assert [store.get(key).tier for key in "abc"] == ["device", "disk", "host"]
    assert same_kv(store.get("a"), entry(40, 0))
    store.pin("a")
    assert not store.promote("b", "cpu")
    assert not store.promote("absent", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_chunks_of_a_cuda_device_wait_in_page_locked_memory(tmp_path):
    store = ChunkStore(40, 40, tmp_path)
    for seed, key in enumerate("abc"):
        store.put(key, [tuple(t.cuda() for t in layer) for layer in entry(40, seed)])
    found = [store.get(key) for key in "abc"]
    assert [chunk.tier for chunk in found] == ["disk", "host", "device"]
    assert [chunk.layer(0)[0].is_cuda for chunk in found] == [False, False, True]
    assert [chunk.layer(0)[0].is_pinned() for chunk in found] == [True, True, False]
    assert store.promote("a", "cuda")
    assert store.get("a").layer(0)[0].is_cuda
    for seed, key in enumerate("abc"):
        assert same_kv([tuple(t.cpu() for t in layer) for layer in store.get(key)], entry(40, seed))


def test_by_cost_what_compiles_slowly_stays_until_it_has_aged():
    def put(key, seconds, size=40):
        header = Header(dtype="float32", tokens=size // 8, compile_seconds=seconds)
        store.put(key, entry(size), header)

    store = ChunkStore(80, eviction="cost")
    put("slow", 4.0)
    put("quick", 1.0)
    put("next", 1.0)
    assert ("slow" in store, "quick" in store, "next" in store) == (True, False, True)
    for index in range(2):  # each loss raises the floor by one second per 40 bytes
        put(f"n{index}", 1.0)
        assert "slow" in store
    put("last", 1.0)
    put("after", 1.0)
    assert "slow" not in store  # GreedyDual: the floor has come up to what it was worth


def test_nothing_in_use_or_pinned_leaves_and_a_full_store_says_so():
    store = ChunkStore(80)
    store.put("a", entry(40))
    store.put("b", entry(40))
    store.pin("a")
    with store.using(["b", "b", "later"]):
        with store.using(["b"]):
            pass
        with pytest.raises(PICacheError, match="2 of the 2 chunks in memory are pinned or in use"):
            store.put("c", entry(40))
        assert [key for key in "abc" if key in store] == ["a", "b"]
        with pytest.raises(PICacheError, match="while 2 chunks are in use"):
            store.clear()
        assert len(store) == 2
    store.put("c", entry(40))
    assert [key for key in "abc" if key in store] == ["a", "c"]
    store.unpin("a")
    store.put("d", entry(40))
    assert [key for key in "acd" if key in store] == ["c", "d"]
    with pytest.raises(PICacheError, match="cannot pin 'a': it is not in the store"):
        store.pin("a")
    with pytest.raises(PICacheError, match="cannot unpin 'c': it is not pinned"):
        store.unpin("c")
    store.clear()
    assert (len(store), store.nbytes) == (0, 0)


good = torch.zeros(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ([], "no layers"),
        ([(good, good), (good, good.clone().index_fill_(2, torch.tensor(1), math.nan))],
         "has nan in the values of layer 1"),
        ([(good - math.inf, good)], "has -inf in the keys of layer 0"),
        ([(good, good), (good[:, :, :2], good)], r"shape \(1, 2, 2, 4\) in layer 1"),
        ([(good, good.half())], "float16"),
        ([(good.int(), good.int())], "dtype int32: expected one of float64"),
        ([(good[0], good[0])], r"shape \(2, 3, 4\) in layer 0"),
        ([(good[:, :, :0], good[:, :, :0])], "none of them 0"),
    ],
)  # fmt: skip
def test_bad_tensors_are_refused_and_the_store_is_unchanged(kv, message, tmp_path):
    store = ChunkStore(path=tmp_path)
    store.put("a", [(good, good)])
    before = repr(store)
    with pytest.raises(PICacheError, match=f"chunk b.*{message}"):
        store.put("b", kv)
    assert repr(store) == before
    assert "b" not in store


@pytest.mark.parametrize(
    "changed", [{"tokens": 4}, {"dtype": "bfloat16"}, {"namespace": "x"}, {"storage": "int8"}]
)
def test_a_header_that_says_otherwise_than_the_tensors_or_the_store_is_refused(changed):
    store, header = ChunkStore(), Header(dtype="float32", tokens=3)
    with pytest.raises(PICacheError, match=next(iter(changed))):
        store.put("a", [(good, good)], replace(header, **changed))
    assert len(store) == 0
    store.put("a", [(good, good)], header)
    assert store.get("a").header == header


def test_keys_hold_every_field_but_the_time():
    header = Header(model="m", dtype="float32", tokens=2)
    others = dict.fromkeys(("model", "fingerprint", "revision", "dtype", "rope"), "other")
    others |= {"sinks": "keep", "namespace": "t", "storage": "int8", "tokens": 3}
    assert set(others) | {"compile_seconds"} == set(header.__dataclass_fields__)
    keys = {chunk_key((1, 2), replace(header, **{name: value})) for name, value in others.items()}
    keys |= {chunk_key((1, 2), header), chunk_key((1, 3), header), chunk_key((12,), header)}
    assert len(keys) == len(others) + 3
    assert chunk_key((1, 2), replace(header, compile_seconds=1.0)) in keys


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_small_storage_halves_the_bytes_and_gives_the_dtype_back(storage, tmp_path):
    kv = [(torch.randn(1, 2, 64, 64).bfloat16(), torch.randn(1, 2, 64, 64).bfloat16())]
    store, plain = ChunkStore(path=tmp_path, storage=storage), ChunkStore()
    for target in (store, plain):
        target.put("a", kv)
    assert store.nbytes < 0.6 * plain.nbytes
    again = ChunkStore(path=tmp_path, storage=storage)
    for found in (store.get("a"), again.get("a")):
        assert all(t.dtype == torch.bfloat16 for layer in found for t in layer)
        assert same_kv(found, store.get("a").load())
        torch.testing.assert_close(found.layer(0)[1], kv[0][1], atol=0.05, rtol=0.08)
    assert "a" not in ChunkStore(path=tmp_path)


def test_a_chunk_is_read_one_layer_at_a_time_from_any_tier(tmp_path):
    kv = entry(40, 0) + entry(40, 1)
    ChunkStore(path=tmp_path).put("a", kv)
    for store, tier in ((ChunkStore(), "device"), (ChunkStore(path=tmp_path), "disk")):
        if tier == "device":
            store.put("a", kv)
        chunk = store.get("a")
        assert (chunk.tier, chunk.num_layers, len(chunk)) == (tier, 2, 2)
        assert same_kv([chunk.layer(1)], kv[1:])
        assert same_kv(chunk.load(), kv)
        with pytest.raises(IndexError, match="of a chunk of 2 layers"):
            chunk.layer(2)


def test_nothing_in_the_package_can_unpickle():
    """But for `sweep`, which hands tasks to processes that it starts, and reads no file."""
    folder = Path(picache.__file__).parent
    sweep = folder / "sweep.py"
    for word in ("open(", "read_bytes", "picache.store", "os.read"):
        assert word not in sweep.read_text()
    text = "\n".join(path.read_text() for path in folder.rglob("*.py") if path != sweep)
    for word in ("pickle", "torch.load", "marshal", "shelve", "eval(", "exec("):
        assert word not in text.replace(".eval()", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_bytes": 0}, "device_bytes must be positive, got 0"),
        ({"host_bytes": -1}, "host_bytes must be positive, got -1"),
        ({"disk_bytes": 5}, "disk_bytes=5 needs a path"),
        ({"eviction": "fifo"}, "eviction must be one of lru, cost, got 'fifo'"),
        ({"storage": "int4"}, "storage must be one of exact, int8, fp8, got 'int4'"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(PICacheError, match=message):
        ChunkStore(**arguments)


def test_compiling_twice_is_a_hit_and_evicted_chunks_come_back():
    model = tiny_model("llama")
    one = PIC(model).compile(random_ids(20)).nbytes
    pic = PIC(model, store=ChunkStore(device_bytes=2 * one))
    documents = [random_ids(20, seed=s) for s in range(3)]
    chunks = compiled(pic, documents)
    assert pic.store.evictions == 1
    hits = pic.store.hits
    assert pic.compile(documents[2]) == chunks[2]
    assert pic.store.hits == hits + 1
    prompt = pic.link(chunks, random_ids(3), LegoLink(2))
    # What is compiled again does not push out the others, which the link is about to read.
    assert (prompt.report.hits, prompt.report.misses) == (2, 1)
    whole = PIC(model)
    expected = whole.link(compiled(whole, documents), random_ids(3), LegoLink(2))
    assert torch.equal(prompt.logits, expected.logits)
    assert pic.store.nbytes <= 2 * one


def test_a_stored_chunk_comes_back_to_the_bit_and_links_do_not_touch_it():
    pic = PIC(tiny_model("llama"))
    chunks = chunks_of(pic, 5, 12)
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
