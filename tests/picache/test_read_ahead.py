"""Reading ahead: what is read when, by whom, and what an error or an end does to it."""

import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch

from picache import PIC, ChunkStore, LegoLink
from picache.errors import CorruptChunk
from picache.linking import read_ahead
from picache.linking.read_ahead import AHEAD, ReadAhead
from tests.helpers import random_ids, tiny_model
from tests.picache.helpers import compiled

LAYERS = 6


class Parts:
    """Chunks whose layers are their own names; notes which were read, and by which threads."""

    def __init__(self, count, fails=()):
        self.read, self.threads, self.fails = [], set(), fails
        self.functions = [lambda layers, part=part: self(part, layers) for part in range(count)]

    def __call__(self, part, layers):
        self.read += [(part, layer) for layer in layers]
        self.threads.add(threading.current_thread().name)
        for layer in layers:
            if (part, layer) in self.fails:
                raise CorruptChunk(f"{part} {layer}")
        return [(part, layer) for layer in layers]


def one_by_one(layers):
    return [range(layer, layer + 1) for layer in range(layers)]


@pytest.mark.parametrize("groups", [one_by_one(LAYERS), [range(4), range(4, 6)], [range(6)]])
def test_each_layer_of_each_chunk_is_read_once_and_the_next_ones_beside_it(groups):
    parts = Parts(3)
    ahead = ReadAhead(parts.functions, groups, nullcontext)
    for index, layers in enumerate(groups):
        assert ahead(index) == [[(part, layer) for layer in layers] for part in range(3)]
        last = groups[min(index + AHEAD, len(groups) - 1)]
        assert max(layer for _, layer in parts.read) <= last[-1]
    ahead.close()
    assert sorted(parts.read) == [(part, layer) for part in range(3) for layer in range(LAYERS)]
    assert all(name.startswith("picache-read") for name in parts.threads)
    assert not any(t.name.startswith("picache-read") for t in threading.enumerate())


def test_layers_of_several_chunks_are_read_at_the_same_time():
    together = threading.Barrier(3, timeout=30)

    def part(layers):
        together.wait()  # breaks unless three threads come
        return layers

    ahead = ReadAhead([part] * 3, one_by_one(1), nullcontext)
    assert ahead(0) == [range(1)] * 3
    ahead.close()


def test_an_error_is_raised_when_its_layer_is_due_and_not_before():
    ahead = ReadAhead(Parts(2, fails={(1, 2)}).functions, one_by_one(LAYERS), nullcontext)
    assert ahead(0) == [[(0, 0)], [(1, 0)]]  # layer 2 is being read, or has failed
    assert ahead(1) == [[(0, 1)], [(1, 1)]]
    with pytest.raises(CorruptChunk, match="1 2"):
        ahead(2)
    ahead.close()


def test_closing_cancels_what_has_not_begun(monkeypatch):
    monkeypatch.setattr(read_ahead, "READERS", 1)
    go_on, read = threading.Event(), []

    def part(layers):
        read.extend(layers)
        if 1 in layers:
            go_on.wait(30)
        return layers

    ahead = ReadAhead([part], one_by_one(LAYERS), nullcontext)
    assert ahead(0) == [range(1)]
    threading.Timer(0.2, go_on.set).start()
    ahead.close()
    assert read in ([0], [0, 1])


def test_threads_read_inside_what_they_are_given():
    inside = threading.local()

    @contextmanager
    def given():
        inside.now = True
        yield
        inside.now = False

    ahead = ReadAhead([lambda layers: inside.now], one_by_one(LAYERS), given)
    assert all(ahead(layer) == [True] for layer in range(LAYERS))
    ahead.close()


def test_a_chunk_with_several_damaged_layers_is_dropped_once(tmp_path):
    model = tiny_model("llama")
    texts, query = [random_ids(n, seed=n) for n in (40, 30)], random_ids(4)
    own = PIC(model)
    expected = own.link(compiled(own, texts), query, LegoLink(3)).logits
    store = ChunkStore(device_bytes=1, path=tmp_path)
    pic = PIC(model, store=store)
    chunks = compiled(pic, texts)
    (path,) = tmp_path.rglob(f"{chunks[1].key}*")
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for place in range(header, len(data), 100):  # in every layer
        data[place] ^= 1
    path.write_bytes(data)
    prompt = pic.link(chunks, query, LegoLink(3))
    assert torch.equal(prompt.logits, expected)
    assert prompt.report.chunk_hits == (True, False)
    assert store.corrupt == 1
    assert all(pic.link(chunks, query).report.chunk_hits), "the file was written again"
    assert not any(t.name.startswith("picache-read") for t in threading.enumerate())
