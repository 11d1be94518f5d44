"""Where chunks lie, and how often each layer is placed: on the device, in host memory, in 8 bits.

The streams and events of a CUDA link are replaced by nothing, so that its order runs on a CPU.
"""

import gc
import math
import pickle
import threading
import time
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from picache import A3, PIC, ChunkStore, LegoLink, ProphetKV
from picache.hf.padded_pass import PaddedPass
from picache.linking import link, linked_kv
from picache.linking.linked_kv import LinkedKV
from picache.linking.stopwatch import Stopwatch
from picache.store import memory, together
from picache.store.stored import StoredChunk
from tests.helpers import random_ids, tiny_model
from tests.picache.captured import assert_same

LAYERS, METHODS = 4, [LegoLink(3), A3(0.2), ProphetKV(0.2)]


class Placed:
    """What was placed: rows at once, by how many in each launch, and layers one by one."""

    def __init__(self):
        self.at_once, self.layers = [], []


@pytest.fixture
def placed(captured, monkeypatch):
    """A link that behaves as on a CUDA device, where chunks in host memory are to be copied."""
    found = Placed()
    init, make, place = LinkedKV.__init__, LinkedKV._make, linked_kv.place_rows
    resident = StoredChunk.resident

    def like_cuda(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if args[5] is not None:
            self._stream = SimpleNamespace(record_event=lambda: None)

    def counted(rows, at, places, watch):
        found.at_once.append(len(rows))
        return place(rows, at, places, watch)

    def made(self, group):
        found.layers += self._groups[group]
        return make(self, group)

    monkeypatch.setattr(LinkedKV, "__init__", like_cuda)
    monkeypatch.setattr(LinkedKV, "_loading", lambda self: nullcontext())
    monkeypatch.setattr(LinkedKV, "_make", made)
    monkeypatch.setattr(
        StoredChunk, "resident",
        lambda self, device: None if self.tier == "host" else resident(self, device),
    )  # fmt: skip
    monkeypatch.setattr(ChunkStore, "promote", lambda *_: False)  # they stay where they are
    for where in (link, linked_kv):
        monkeypatch.setattr(where, "place_rows", counted)
    return found


def two_tiers(method_needs=None):
    """A PIC whose first chunks lie in host memory and whose last on the device."""
    model = tiny_model("llama")
    store = ChunkStore(device_bytes=100 * PIC(model).hf.bytes_per_token, host_bytes=math.inf)
    pic = PIC(model, store=store, flops_per_byte=method_needs)
    host, device = (
        [pic.compile(random_ids(40, seed=s)) for s in seeds] for seeds in ((1, 2), (5, 6))
    )
    assert [store._find(chunk.key).tier for chunk in (*host, *device)] == [
        *["host"] * 2,
        *["device"] * 2,
    ]
    return pic, host, device


def bytes_of(chunks):
    return sum(chunk.nbytes for chunk in chunks)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_layer_of_chunks_on_the_host_is_made_once(method, placed, eagerly):
    pic, host, _ = two_tiers()
    query = random_ids(6)
    expected = eagerly(pic, host, query, method)
    placed.layers.clear()
    prompt = pic.link(host, query, method)
    assert sorted(placed.layers) == [*range(LAYERS)]
    assert placed.at_once == []
    assert prompt.report.bytes_loaded == bytes_of(host)
    assert_same(prompt, expected)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_row_on_the_device_is_placed_once_beside_one_on_the_host(method, placed, eagerly):
    pic, host, device = two_tiers()
    rows, queries = [device, host], [random_ids(6), random_ids(4, seed=1)]
    expected = eagerly(pic, rows, queries, method)
    placed.layers.clear()
    prompt = pic.link(rows, queries, method)
    assert placed.at_once == [1]
    assert sorted(placed.layers) == [*range(LAYERS)]
    assert [one.bytes_loaded for one in prompt.reports] == [bytes_of(device), bytes_of(host)]
    assert_same(prompt, expected)


def test_a_row_beside_one_that_is_prefilled_in_full_is_placed_once(placed, monkeypatch):
    pic, host, device = two_tiers()
    choose = link.Link._choose

    def full(self, linking, *args):
        choose(self, linking, *args)
        if linking.row.chunks[0].key == host[0].key:
            linking.full_prefill = "as the cost says"

    monkeypatch.setattr(link.Link, "_choose", full)
    prompt = pic.link([device, host], [random_ids(6), random_ids(6)], LegoLink(3))
    assert (placed.at_once, placed.layers) == ([1], [])
    assert [bool(one.full_prefill) for one in prompt.reports] == [False, True]


def on_disk(path):
    """A PIC whose chunks lie on disk alone, and those chunks."""
    pic = PIC(tiny_model("llama"), store=ChunkStore(device_bytes=1, path=path), flops_per_byte=None)
    return pic, [pic.compile(random_ids(40, seed=seed)) for seed in range(3)]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_captured_pass_computes_while_the_disk_is_read(
    method, captured, eagerly, monkeypatch, tmp_path
):
    monkeypatch.setattr(together, "MOST_LAYERS", 1)
    pic, chunks = on_disk(tmp_path)
    query = random_ids(6)
    expected = eagerly(pic, chunks, query, method)
    attended, layers, attend = threading.Event(), StoredChunk.layers, PaddedPass.attend

    def slow(self, group, *device):
        if LAYERS - 1 in group:
            assert attended.wait(30), "no layer was computed before the last one was there"
        return layers(self, group, *device)

    def noted(self, mask):
        attended.set()
        return attend(self, mask)

    monkeypatch.setattr(StoredChunk, "layers", slow)
    monkeypatch.setattr(PaddedPass, "attend", noted)
    pic.link(chunks, query, method)  # records the passes, which runs them once
    for _ in range(2):
        attended.clear()
        prompt = pic.link(chunks, query, method)
        assert prompt.report.recompute_pass.startswith("captured")
        assert_same(prompt, expected)


@pytest.mark.parametrize("damaged", range(LAYERS))
def test_a_layer_found_damaged_while_the_captured_pass_runs_is_mended(
    damaged, captured, eagerly, monkeypatch, tmp_path
):
    monkeypatch.setattr(together, "MOST_LAYERS", 1)
    pic, chunks = on_disk(tmp_path)
    query = random_ids(6)
    expected = eagerly(pic, chunks, query, LegoLink(3))
    pic.link(chunks, query, LegoLink(3))
    (path,) = tmp_path.rglob(f"{chunks[1].key}*")
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin + (len(data) - begin) * (2 * damaged + 1) // (2 * LAYERS)] ^= 1
    path.write_bytes(data)
    prompt = pic.link(chunks, query, LegoLink(3))
    assert prompt.report.chunk_hits == (True, False, True)
    assert prompt.report.recompute_pass.startswith("captured")
    assert_same(prompt, expected)


def test_a_chunk_on_the_device_lies_there_in_other_groups_than_are_loaded(monkeypatch, tmp_path):
    """A small one that was brought back, beside a large one that is read from a disk."""
    monkeypatch.setattr(together, "AT_ONCE", 2**16)
    model = tiny_model("llama", num_hidden_layers=8)
    documents, query = [random_ids(20, seed=1), random_ids(120, seed=2)], random_ids(9)
    own = PIC(model, flops_per_byte=None)
    expected = own.link([own.compile(one) for one in documents], query, LegoLink(3))
    writer = PIC(model, store=ChunkStore(device_bytes=1, path=tmp_path))
    for one in documents:
        writer.compile(one)
    each = own.hf.bytes_per_token
    pic = PIC(model, store=ChunkStore(device_bytes=40 * each, path=tmp_path), flops_per_byte=None)
    chunks = [pic.compile(one) for one in documents]
    tiers = [pic.store._find(chunk.key).tier for chunk in chunks]
    assert tiers == ["device", "disk"]
    small, large = (together.layer_groups(8, chunk.nbytes) for chunk in chunks)
    assert len(small) < len(large)
    assert_same(pic.link(chunks, query, LegoLink(3)), expected)


def test_memory_that_lacks_for_loading_is_not_taken_for_that_of_the_capture(
    captured, monkeypatch, tmp_path
):
    monkeypatch.setattr(together, "MOST_LAYERS", 1)
    pic, chunks = on_disk(tmp_path)
    query = random_ids(6)
    expected = pic.link(chunks, query, LegoLink(3))
    recorded, layers = dict(pic.passes._recorded), StoredChunk.layers

    def full(self, group, *device):
        if 2 in group:
            raise torch.OutOfMemoryError("no memory for a layer")
        return layers(self, group, *device)

    with monkeypatch.context() as patch:
        patch.setattr(StoredChunk, "layers", full)
        with pytest.raises(torch.OutOfMemoryError, match="for a layer"):
            pic.link(chunks, query, LegoLink(3))
    assert pic.passes._recorded == recorded
    assert_same(pic.link(chunks, query, LegoLink(3)), expected)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_waiting_for_a_disk_is_not_time_of_the_recomputation(
    method, captured, monkeypatch, tmp_path
):
    monkeypatch.setattr(together, "MOST_LAYERS", 1)
    pic, chunks = on_disk(tmp_path)
    pic.link(chunks, random_ids(6), method)
    layers = StoredChunk.layers

    def slow(self, group, *device):
        time.sleep(0.25)
        return layers(self, group, *device)

    monkeypatch.setattr(StoredChunk, "layers", slow)
    seconds = pic.link(chunks, random_ids(6), method).report.seconds
    assert seconds["first_token"] > 0.5
    assert seconds["recompute"] + seconds["choose"] < 0.4 * seconds["first_token"]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_nothing_is_waited_for_where_all_chunks_are_on_the_device(method, captured, monkeypatch):
    pic = PIC(tiny_model("llama"), flops_per_byte=None)
    chunks, spans, span = [pic.compile(random_ids(40))], [], Stopwatch.span
    monkeypatch.setattr(
        Stopwatch, "span", lambda self, name: spans.append(name) or span(self, name)
    )
    for _ in range(2):
        pic.link(chunks, random_ids(6), method)
    assert "recompute" in spans
    assert not [name for name in spans if name.startswith("wait")]


def test_the_seconds_of_placing_are_shared_by_the_rows(placed):
    pic, _, device = two_tiers()
    reports = pic.link([device, device[::-1]], [random_ids(6)] * 2, LegoLink(3)).reports
    assert placed.at_once == [2]
    assert reports[0].seconds["load"] == reports[1].seconds["load"] > 0


def copied(layers):
    return [{name: part.clone() for name, part in layer.items()} for layer in layers]


def test_chunks_that_leave_the_device_leave_nothing_there(captured, monkeypatch):
    monkeypatch.setattr(memory, "to_host", copied)  # as it is from a device
    model = tiny_model("llama")
    store = ChunkStore(device_bytes=120 * PIC(model).hf.bytes_per_token, host_bytes=math.inf)
    pic = PIC(model, store=store, flops_per_byte=None)
    on_device = []
    for seed in range(6):
        chunk = pic.compile(random_ids(50, seed=seed))
        layers = store._memory.tiers[0].entries[chunk.key].layers
        on_device += [weakref.ref(part) for layer in layers for part in layer.values()]
        del layers
        pic.link([chunk], random_ids(3), LegoLink(3))
    gc.collect()
    left = sum(part.nbytes for ref in on_device if (part := ref()) is not None)
    assert left == store._memory.tiers[0].nbytes <= 120 * pic.hf.bytes_per_token


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_chunks_in_8_bits_are_decoded_once_for_all_rows(storage, captured, eagerly, monkeypatch):
    pic = PIC(tiny_model("llama"), store=ChunkStore(storage=storage), flops_per_byte=None)
    chunks, query = [pic.compile(random_ids(20, seed=s)) for s in range(3)], random_ids(5)
    rows = [chunks, chunks[::-1], chunks[:2]]
    expected = eagerly(pic, rows, [query] * 3, LegoLink(3))
    decoded, own = [], StoredChunk.layers

    def counted(self, layers, device=None):
        decoded.extend((self.key, layer) for layer in layers)
        return own(self, layers, device)

    monkeypatch.setattr(StoredChunk, "layers", counted)
    prompt = pic.link(rows, [query] * 3, LegoLink(3))
    # The first chunk of a prompt and the same chunk elsewhere have keys of their own.
    assert len(decoded) == len(set(decoded))
    assert_same(prompt, expected)


def test_a_chunk_is_pickled_without_what_links_have_made_of_it(captured):
    pic = PIC(tiny_model("llama"))
    chunk = pic.compile(random_ids(20))
    before = pickle.dumps(chunk)
    first = pic.link([chunk], random_ids(3))
    assert pickle.dumps(chunk) == before
    again = pickle.loads(before)
    assert again == chunk
    assert_same(pic.link([again], random_ids(3)), first)
