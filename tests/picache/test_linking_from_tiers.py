"""Links whose chunks come from host memory, disk, a reduced storage, or a damaged file."""

import math
import threading

import pytest
import torch

from picache import PIC, ChunkStore, FullRecompute, LegoLink, PICacheError
from picache.linking.linked_kv import LinkedKV
from picache.store import together
from tests.helpers import assert_close, random_ids, tiny_model
from tests.picache.helpers import compiled

LENGTHS = (9, 30, 21)


def documents():
    return [random_ids(n, seed=n) for n in LENGTHS], random_ids(4, seed=4)


def linked(pic, method=None):
    texts, query = documents()
    return pic.link(compiled(pic, texts), query, method or LegoLink(3))


@pytest.fixture(scope="module")
def model():
    return tiny_model("gemma3")


@pytest.fixture(scope="module")
def expected(model):
    return linked(PIC(model)).logits


def test_every_tier_links_to_the_bit(model, expected, tmp_path):
    one = PIC(model).hf.bytes_per_token * max(LENGTHS)
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
    chunks = compiled(pic, texts)
    assert {c.key for c in chunks}.isdisjoint(exact.compile(text).key for text in texts)
    error = pic.link(chunks, query).logits - linked(exact, LegoLink()).logits
    assert 0 < error.norm() < 0.2 * linked(exact).logits.norm()
    with pytest.raises(PICacheError, match="compiled with another model"):
        exact.link(chunks, query)


@pytest.mark.parametrize("storage", ["exact", "int8", "fp8"])
def test_a_chunk_there_is_no_room_for_is_used_as_it_would_be_stored(model, storage):
    texts, query = documents()
    roomy = PIC(model, store=ChunkStore(storage=storage))
    chunks = compiled(roomy, texts)
    full = PIC(model, store=ChunkStore(device_bytes=1, storage=storage))
    prompt = full.link(chunks, query, LegoLink(3))
    assert not any(prompt.report.chunk_hits)
    assert torch.equal(prompt.logits, roomy.link(chunks, query, LegoLink(3)).logits)


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.fixture
def one_by_one(monkeypatch):
    """Layers are loaded one by one, as those of long chunks of a large model are."""
    monkeypatch.setattr(together, "MOST_LAYERS", 1)


def test_a_damaged_file_is_compiled_again_in_the_middle_of_a_link(
    model, expected, one_by_one, tmp_path
):
    """The damage shows when the layer is read, after others have been used."""
    linked(PIC(model, store=ChunkStore(path=tmp_path)))
    store = ChunkStore(device_bytes=1, path=tmp_path)
    pic = PIC(model, store=store)
    texts, query = documents()
    chunks = compiled(pic, texts)
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


def test_the_next_layer_is_loaded_while_this_one_is_computed(
    model, one_by_one, monkeypatch, tmp_path
):
    """Layer i + 1 is put together by another thread, begun before layer i is left."""
    linked(PIC(model, store=ChunkStore(path=tmp_path)))
    pic = PIC(model, store=ChunkStore(device_bytes=1, path=tmp_path))
    texts, query = documents()
    chunks = compiled(pic, texts)
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
    handle = pic.hf.decoder.layers[0].mlp.register_forward_hook(forward_hook)
    try:
        pic.link(chunks, query, LegoLink(3))
    finally:
        handle.remove()
    assert [layer for layer, _ in made] == [0, 1, 2, 3]
    assert all(name.startswith("picache-load") for layer, name in made if layer)
    assert not any(t.name.startswith("picache-load") for t in threading.enumerate())


def test_an_error_in_the_loading_thread_reaches_the_caller(
    model, one_by_one, monkeypatch, tmp_path
):
    linked(PIC(model, store=ChunkStore(path=tmp_path)))
    pic = PIC(model, store=ChunkStore(device_bytes=1, path=tmp_path))
    texts, query = documents()
    chunks = compiled(pic, texts)
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
    one = PIC(model).hf.bytes_per_token * max(LENGTHS)
    store = ChunkStore(device_bytes=one, host_bytes=math.inf)
    pic = PIC(model, store=store)
    texts, query = documents()
    chunks = compiled(pic, texts)
    assert store.get(chunks[0].key).tier == "host"
    pic.link(chunks[:1], query)
    assert store.get(chunks[0].key).tier == "device"


def in_another_thread(work):
    """Run `work` in a thread of its own; the error it ended with, or None."""
    failed = []

    def run():
        try:
            work()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return failed[0] if failed else None


def while_linking(pic, chunks, query, work):
    """Link, `work` going on in another thread between layers 0 and 1; its error, and the prompt."""
    errors = []
    handle = pic.hf.decoder.layers[0].mlp.register_forward_hook(
        lambda *_: errors.append(in_another_thread(work))
    )
    try:
        prompt = pic.link(chunks, query, LegoLink(3))
    finally:
        handle.remove()
    (error,) = errors
    return error, prompt


def test_nobody_evicts_a_chunk_that_a_link_is_reading(model, expected):
    texts, query = documents()
    room = PIC(model).hf.bytes_per_token * sum(LENGTHS)
    pic = PIC(model, store=ChunkStore(device_bytes=room))
    chunks = compiled(pic, texts)
    other = [(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))]
    error, prompt = while_linking(pic, chunks, query, lambda: pic.store.put("other", other))
    assert "3 of the 3 chunks in memory are pinned or in use" in str(error)
    assert torch.equal(prompt.logits, expected)
    assert all(chunk.key in pic.store for chunk in chunks)
    error, _ = while_linking(pic, chunks, query, pic.store.clear)
    assert "while 3 chunks are in use" in str(error)
    pic.store.put("other", other)  # the references went with the link
    assert chunks[0].key not in pic.store


def test_nobody_deletes_a_file_that_a_link_is_reading(model, expected, tmp_path):
    linked(PIC(model, store=ChunkStore(path=tmp_path)))
    room = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    store = ChunkStore(device_bytes=1, path=tmp_path, disk_bytes=room)
    pic = PIC(model, store=store)
    texts, query = documents()
    chunks = compiled(pic, texts)
    other = [(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))]
    with pytest.warns(RuntimeWarning, match="do not fit disk_bytes"):
        error, prompt = while_linking(pic, chunks, query, lambda: store.put("other", other))
    assert "does not fit a store" in str(error)
    assert torch.equal(prompt.logits, expected)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    store.put("other", other)
    assert chunks[0].key not in store


def test_a_link_brings_up_what_fits_beside_what_it_reads(model):
    """Chunks of one link do not push each other down, link after link; others make room."""
    one = PIC(model).hf.bytes_per_token * max(LENGTHS)
    store = ChunkStore(device_bytes=one, host_bytes=math.inf)
    pic = PIC(model, store=store)
    texts, query = documents()
    first, long, last = (pic.compile(text) for text in texts)
    assert [store.get(c.key).tier for c in (first, long, last)] == ["host", "host", "device"]
    demotions = store.demotions
    for _ in range(2):
        pic.link([last, long], query)
        assert [store.get(c.key).tier for c in (long, last)] == ["host", "device"]
    assert store.demotions == demotions
    pic.link([long], query)
    assert [store.get(c.key).tier for c in (long, last)] == ["device", "host"]
