"""Links whose chunks come from host memory, disk, a reduced storage, or a damaged file."""

import math
import threading

import pytest
import torch

from picache import PIC, ChunkStore, FullRecompute, LegoLink, PICacheError
from picache.place import LinkedKV
from tests.helpers import assert_close, random_ids, tiny_model

LENGTHS = (9, 30, 21)


def documents():
    return [random_ids(n, seed=n) for n in LENGTHS], random_ids(4, seed=4)


def linked(pic, method=None):
    texts, query = documents()
    return pic.link([pic.compile(text) for text in texts], query, method or LegoLink(3))


@pytest.fixture(scope="module")
def model():
    return tiny_model("gemma3")


@pytest.fixture(scope="module")
def expected(model):
    return linked(PIC(model)).logits


def test_every_tier_links_to_the_bit(model, expected, tmp_path):
    one = PIC(model)._model.bytes_per_token * max(LENGTHS)
    host = ChunkStore(device_bytes=one, host_bytes=math.inf)
    disk = ChunkStore(device_bytes=one, path=tmp_path)
    for store in (host, disk):
        pic = PIC(model, store=store)
        linked(pic)
        prompt = linked(pic)
        assert torch.equal(prompt.logits, expected)
        assert all(prompt.report.chunk_hits)


def test_a_second_process_finds_the_first_ones_chunks(model, expected, tmp_path):
    linked(PIC(model, store=ChunkStore(path=tmp_path)))
    fresh = ChunkStore(path=tmp_path)
    prompt = linked(PIC(model, store=fresh))
    assert torch.equal(prompt.logits, expected)
    assert all(prompt.report.chunk_hits)
    assert fresh.misses == 0


def test_another_model_finds_nothing_there(model, tmp_path):
    linked(PIC(model, store=ChunkStore(path=tmp_path)))
    for other in (tiny_model("gemma3", seed=1), tiny_model("gemma3", dtype=torch.bfloat16)):
        store = ChunkStore(path=tmp_path)
        linked(PIC(other, store=store))
        assert store.misses == 3


def test_tenants_do_not_mix(model, tmp_path):
    linked(PIC(model, store=ChunkStore(path=tmp_path, namespace="a")))
    store = ChunkStore(path=tmp_path, namespace="b")
    chunk = PIC(model, store=store).compile(documents()[0][0])
    assert store.misses == 1
    with pytest.raises(PICacheError, match="compiled with another model"):
        PIC(model, store=ChunkStore(namespace="a")).link([chunk], random_ids(2))


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_reduced_storage_is_close_and_never_passes_as_exact(model, storage):
    pic, exact = PIC(model, store=ChunkStore(storage=storage)), PIC(model)
    texts, query = documents()
    chunks = [pic.compile(text) for text in texts]
    assert {c.key for c in chunks}.isdisjoint(exact.compile(text).key for text in texts)
    error = pic.link(chunks, query).logits - linked(exact, LegoLink()).logits
    assert 0 < error.norm() < 0.2 * linked(exact).logits.norm()
    with pytest.raises(PICacheError, match="compiled with another model"):
        exact.link(chunks, query)


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_a_damaged_file_is_compiled_again_in_the_middle_of_a_link(model, expected, tmp_path):
    """The damage shows when the layer is read, after others have been used."""
    linked(PIC(model, store=ChunkStore(path=tmp_path)))
    store = ChunkStore(device_bytes=1, path=tmp_path)
    pic = PIC(model, store=store)
    texts, query = documents()
    chunks = [pic.compile(text) for text in texts]
    (file,) = tmp_path.rglob(f"{chunks[1].key}*")
    flip_last_byte(file)
    prompt = pic.link(chunks, query, LegoLink(3))
    assert torch.equal(prompt.logits, expected)
    assert prompt.report.chunk_hits == (True, False, True)
    assert store.corrupt == 1
    assert all(pic.link(chunks, query).report.chunk_hits), "the file was written again"


def test_a_damaged_file_is_compiled_again_by_compile(model, expected, tmp_path):
    linked(PIC(model, store=ChunkStore(path=tmp_path)))
    for file in tmp_path.rglob("*.safetensors"):
        flip_last_byte(file)
    store = ChunkStore(path=tmp_path)
    assert torch.equal(linked(PIC(model, store=store)).logits, expected)
    assert store.corrupt == 3


def test_the_next_layer_is_loaded_while_this_one_is_computed(model, monkeypatch, tmp_path):
    """Layer i + 1 is put together by another thread, begun before layer i is left."""
    linked(PIC(model, store=ChunkStore(path=tmp_path)))
    pic = PIC(model, store=ChunkStore(device_bytes=1, path=tmp_path))
    texts, query = documents()
    chunks = [pic.compile(text) for text in texts]
    made, loaded = [], threading.Event()
    original = LinkedKV._make

    def watched(self, layer):
        made.append((layer, threading.current_thread().name))
        kv = original(self, layer)
        if layer == 1:
            loaded.set()
        return kv

    def forward_hook(*_):
        assert loaded.wait(30), "layer 1 is not loaded until layer 0 is done"

    monkeypatch.setattr(LinkedKV, "_make", watched)
    handle = pic._model.decoder.layers[0].mlp.register_forward_hook(forward_hook)
    try:
        pic.link(chunks, query, LegoLink(3))
    finally:
        handle.remove()
    assert [layer for layer, _ in made] == [0, 1, 2, 3]
    assert all(name.startswith("picache-load") for layer, name in made if layer)
    assert not any(t.name.startswith("picache-load") for t in threading.enumerate())


def test_an_error_in_the_loading_thread_reaches_the_caller(model, monkeypatch, tmp_path):
    linked(PIC(model, store=ChunkStore(path=tmp_path)))
    pic = PIC(model, store=ChunkStore(device_bytes=1, path=tmp_path))
    texts, query = documents()
    chunks = [pic.compile(text) for text in texts]
    original = LinkedKV._make

    def failing(self, layer):
        if layer == 2:
            raise OSError("the disk is gone")
        return original(self, layer)

    implementation = model.config._attn_implementation
    with monkeypatch.context() as patch:
        patch.setattr(LinkedKV, "_make", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            pic.link(chunks, query)
    assert model.config._attn_implementation == implementation
    assert_close("after", pic.link(chunks, query, FullRecompute()).logits, full(model))


def full(model):
    texts, query = documents()
    with torch.no_grad():
        return model(torch.cat([*texts, query])[None]).logits[:, -1]


def test_a_hot_chunk_comes_back_to_the_device(model):
    one = PIC(model)._model.bytes_per_token * max(LENGTHS)
    store = ChunkStore(device_bytes=one, host_bytes=math.inf)
    pic = PIC(model, store=store)
    texts, query = documents()
    chunks = [pic.compile(text) for text in texts]
    assert store.get(chunks[0].key).tier == "host"
    pic.link(chunks[:1], query)
    assert store.get(chunks[0].key).tier == "device"
