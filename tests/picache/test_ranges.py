"""Remote files that are fetched in ranges, as their layers are asked for."""

import uuid

import pytest
import torch

from picache import PIC, ChunkStore, LegoLink
from picache.errors import CorruptChunk
from picache.store import ranged_copy, together
from picache.store.ranged_copy import RangedCopy
from tests.helpers import random_ids, tiny_model
from tests.picache.helpers import compiled, same_kv

fsspec = pytest.importorskip("fsspec")
KEY, LAYERS = "k" * 32, 4
DATA = bytes(range(256)) * 5


class Served:
    """Gives ranges of `DATA` and remembers which."""

    def __init__(self, data=DATA):
        self.data, self.asked = data, []

    def __call__(self, begin, end):
        self.asked.append((begin, end))
        return self.data[begin:end]


@pytest.fixture
def small(monkeypatch):
    """Segments of 100 bytes."""
    monkeypatch.setattr(ranged_copy, "SEGMENT", 100)


def read(file, begin, count):
    file.seek(begin)
    buffer = bytearray(count)
    assert file.readinto(buffer) == count
    return bytes(buffer)


def test_what_is_read_is_fetched_once_and_neighbours_in_one_call(small):
    served = Served()
    with RangedCopy(len(DATA), served) as file:
        assert served.asked == []
        assert read(file, 150, 10) == DATA[150:160]
        assert read(file, 199, 1) == DATA[199:200]
        assert served.asked == [(100, 200)]
        assert read(file, 50, 500) == DATA[50:550]
        assert served.asked == [(100, 200), (0, 100), (200, 600)]
        assert read(file, 0, len(DATA)) == DATA
        assert served.asked[3:] == [(600, len(DATA))]
        assert read(file, 0, len(DATA)) == DATA
        assert len(served.asked) == 4
        file.seek(len(DATA))
        assert file.readinto(bytearray(5)) == 0


def test_a_server_without_ranges_is_asked_once(small):
    asked = []

    def whole(begin, end):
        asked.append((begin, end))
        return DATA

    with RangedCopy(len(DATA), whole) as file:
        assert read(file, 300, 10) == DATA[300:310]
        assert read(file, 0, len(DATA)) == DATA
    assert asked == [(300, 400)]
    with RangedCopy.of(DATA) as file:
        assert read(file, 300, 10) == DATA[300:310]


def test_a_short_answer_is_the_end_of_the_file_and_is_asked_for_again(small):
    served = Served(DATA[:150])
    with RangedCopy(len(DATA), served) as file:
        file.seek(120)
        assert file.readinto(bytearray(5)) == 0
        served.data = DATA
        assert read(file, 120, 5) == DATA[120:125]


def test_an_error_of_the_server_reaches_the_reader_and_nothing_counts_as_fetched(small):
    served, down = Served(), [True]

    def flaky(begin, end):
        if down:
            raise OSError("503")
        return served(begin, end)

    with RangedCopy(len(DATA), flaky) as file:
        with pytest.raises(OSError, match="503"):
            read(file, 0, 10)
        down.clear()
        assert read(file, 0, 10) == DATA[:10]


# A store behind a URL


@pytest.fixture
def url():
    return f"memory://picache-{uuid.uuid4().hex}/chunks"


@pytest.fixture
def ranges(monkeypatch):
    """The ranges asked of chunk files in memory, as (begin, end)."""
    cls, asked = type(fsspec.filesystem("memory")), []
    original = cls.cat_file

    def watched(self, path, start=None, end=None, **named):
        if path.endswith(".safetensors"):
            asked.append((start, end))
        return original(self, path, start=start, end=end, **named)

    monkeypatch.setattr(cls, "cat_file", watched)
    return asked


def chunk(tokens=40_000):
    """Layers of 1.28 MB, more than a segment."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(1, 1, tokens, 4, generator=generator)

    return [(draw(), draw()) for _ in range(LAYERS)]


def spoil_last_byte(url):
    filesystem = fsspec.filesystem("memory")
    for path in filesystem.find(url.removeprefix("memory:/")):
        if path.endswith(".safetensors"):
            data = bytearray(filesystem.cat_file(path))
            data[-1] ^= 1
            filesystem.pipe_file(path, bytes(data))


def test_a_layer_can_be_used_before_the_chunk_has_arrived(url, ranges):
    kv = chunk()
    ChunkStore(path=url).put(KEY, kv)
    found = ChunkStore(path=url).get(KEY)
    assert len(ranges) == 1, "the header"
    size, segment = found.nbytes, ranged_copy.SEGMENT
    assert same_kv([found.layer(0)], kv[:1])
    assert len(ranges) == 2
    arrived = sum(end - begin for begin, end in ranges)
    assert arrived <= 2 * kv[0][0].nbytes + segment < size / 2
    assert same_kv(found, kv)
    assert sum(end - begin for begin, end in ranges) == size, "each byte once"
    assert len(ranges) <= 1 + LAYERS


def test_damage_is_noticed_when_the_layer_is_due_and_not_before(url, ranges):
    kv = chunk()
    ChunkStore(path=url).put(KEY, kv)
    spoil_last_byte(url)
    ranges.clear()
    store = ChunkStore(path=url)
    found = store.get(KEY)
    assert same_kv(map(found.layer, range(LAYERS - 1)), kv[: LAYERS - 1])
    assert store.corrupt == 0
    with pytest.raises(CorruptChunk, match=f"fails the checksum of layer {LAYERS - 1}"):
        found.layer(LAYERS - 1)
    assert store.corrupt == 1
    assert KEY not in store


def test_a_chunk_deleted_or_replaced_while_it_is_read_is_not_there(url):
    kv = chunk()
    for replace in (False, True):
        writer = ChunkStore(path=url)
        writer.put(KEY, kv)
        store = ChunkStore(path=url)
        found = store.get(KEY)
        assert same_kv([found.layer(0)], kv[:1])
        writer.clear()
        if replace:
            writer.put(KEY, chunk(39_000))
        with pytest.raises(CorruptChunk):
            found.load()
        assert (KEY in store) is replace, "what took its place stays"


@pytest.mark.parametrize("error", [ValueError("no JSON"), TypeError("start="), ConnectionError()])
def test_a_store_that_fails_loses_no_file(url, monkeypatch, error):
    """A refreshed token that is no JSON, a file system without ranges: not the file's fault."""
    ChunkStore(path=url).put(KEY, chunk(10))
    cls = type(fsspec.filesystem("memory"))
    original = cls.cat_file

    def fails(self, path, start=None, end=None, **named):
        if path.endswith(".safetensors"):
            raise error
        return original(self, path, start=start, end=end, **named)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "cat_file", fails)
        store = ChunkStore(path=url, remote_retries=0, remote_pause=0)
        with pytest.warns(RuntimeWarning, match="counts as absent"):
            assert store.get(KEY) is None
        assert store.stats().failures
    assert KEY in ChunkStore(path=url)


def test_a_link_goes_on_while_chunks_arrive_and_mends_what_is_damaged(url, ranges, monkeypatch):
    monkeypatch.setattr(ranged_copy, "SEGMENT", 2**12)
    monkeypatch.setattr(together, "MOST_LAYERS", 1)  # as where layers are large
    model = tiny_model("llama", num_hidden_layers=8)
    texts, query = [random_ids(n, seed=n) for n in (150, 100, 120)], random_ids(4)
    own = PIC(model)
    expected = own.link(compiled(own, texts), query, LegoLink(3)).logits
    pic = PIC(model, store=ChunkStore(device_bytes=1, path=url))
    chunks = compiled(pic, texts)
    arrived = []
    handle = pic.hf.decoder.layers[0].mlp.register_forward_hook(
        lambda *_: arrived.append(sum(end - begin for begin, end in ranges))
    )
    ranges.clear()
    try:
        prompt = pic.link(chunks, query, LegoLink(3))
    finally:
        handle.remove()
    assert torch.equal(prompt.logits, expected)
    total = sum(end - begin for begin, end in ranges)
    assert arrived[0] < 0.8 * total, "the first layer did not wait for the last ones"
    spoil_last_byte(url)
    prompt = pic.link(chunks, query, LegoLink(3))
    assert torch.equal(prompt.logits, expected)
    assert not any(prompt.report.chunk_hits)
    assert pic.store.corrupt == len(chunks)
    assert all(pic.link(chunks, query).report.chunk_hits), "the files were written again"
