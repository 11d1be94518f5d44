"""Documents compiled in batches, against each compiled alone."""

import pytest
import torch

from picache import PIC, ChunkStore, DummySinks, LegoLink, PICacheError
from picache.hf.model import HFModel
from picache.linking import compiled_together
from tests.helpers import random_ids, tiny_model
from tests.picache.captured import TAKEN, families


@pytest.fixture
def _padded_however_long(monkeypatch):
    monkeypatch.setattr(compiled_together, "PADDED", 1e9)


DOCUMENTS = [random_ids(n, seed=n) for n in (7, 20, 33, 1, 18)]


@pytest.mark.usefixtures("_padded_however_long")
@pytest.mark.parametrize("family", [*TAKEN, "Mixtral", "Qwen2-VL (text)", "Phi-3 (longrope)"])
def test_every_family_compiles_as_it_does_alone(family):
    """Some have windows shorter than the documents."""
    try:
        model = families.build(family)
    except AttributeError as error:
        pytest.skip(f"this transformers has no such family: {error}")
    one, all_ = PIC(model, flops_per_byte=None), PIC(model, flops_per_byte=None)
    alone = [one.compile(document) for document in DOCUMENTS]
    together = all_.compile_all(DOCUMENTS)
    assert together == alone
    for chunk in alone:
        expected, found = (pic.store.get(chunk.key) for pic in (one, all_))
        for layer in range(len(one.hf.rotations)):
            pairs = zip(found.layer(layer, "cpu"), expected.layer(layer, "cpu"), strict=True)
            for ours, theirs in pairs:
                assert ours.is_contiguous()
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.fixture
def prefills(monkeypatch):
    """The shapes of what is prefilled."""
    shapes = []
    prefill = HFModel.prefill

    def watched(self, ids, *position):
        shapes.append(tuple(ids.shape))
        return prefill(self, ids, *position)

    monkeypatch.setattr(HFModel, "prefill", watched)
    return shapes


@pytest.mark.usefixtures("_padded_however_long")
def test_what_the_store_has_is_not_compiled_again(prefills):
    pic = PIC(tiny_model("llama"))
    pic.compile(DOCUMENTS[1])
    prefills.clear()
    chunks = pic.compile_all([*DOCUMENTS, DOCUMENTS[0]])
    assert prefills == [(4, 33)]
    assert chunks[0] == chunks[-1]
    assert pic.compile_all([]) == []
    pic.compile_all(DOCUMENTS)
    assert pic.link(chunks, random_ids(3, seed=3), LegoLink(2)).report.chunk_hits == (True,) * 6
    assert prefills == [(4, 33)]


@pytest.mark.usefixtures("_padded_however_long")
def test_batches_hold_no_more_than_they_may(prefills, monkeypatch):
    monkeypatch.setattr(compiled_together, "MOST_TOKENS", 40)
    PIC(tiny_model("llama")).compile_all(DOCUMENTS)
    assert prefills[-3:] == [(2, 7), (2, 20), (1, 33)]


def test_chunks_stand_behind_the_sinks(prefills):
    model = tiny_model("llama")
    pic = PIC(model, sinks=DummySinks(2, token=5))
    prefills.clear()
    (chunk,) = pic.compile_all(DOCUMENTS[:1])
    assert prefills == [(1, 9)]
    assert chunk == pic.compile(DOCUMENTS[0])
    (leading,) = pic.compile_all(DOCUMENTS[:1], first=True)
    assert leading == pic.compile(DOCUMENTS[0], first=True)
    assert prefills == [(1, 9), (1, 7)]


def test_rotary_frequencies_that_follow_the_length_are_those_of_each_document(prefills):
    pic = PIC(families.build("Llama (dynamic NTK)"))
    assert pic.hf.rotary.follows_length
    prefills.clear()
    pic.compile_all(DOCUMENTS)
    assert prefills == [(1, len(document)) for document in DOCUMENTS]


def test_a_long_document_makes_short_ones_no_longer(prefills):
    pic = PIC(tiny_model("llama"), flops_per_byte=None)
    documents = [random_ids(n, seed=n) for n in (*range(20, 34), 400)]
    prefills.clear()
    pic.compile_all(documents)
    padded = sum(rows * longest for rows, longest in prefills)
    assert padded <= 1.5 * sum(map(len, documents))
    assert len(prefills) == 2


def test_each_chunk_bears_its_share_of_the_seconds():
    pic = PIC(tiny_model("llama"), flops_per_byte=None)
    documents = [random_ids(n, seed=n) for n in (20, 24)]
    store = ChunkStore()
    pic.store = store
    chunks = pic.compile_all(documents)
    seconds = [store.get(chunk.key).header.compile_seconds for chunk in chunks]
    assert seconds[0] / seconds[1] == pytest.approx(20 / 24)


def test_what_is_compiled_counts_as_missed_and_what_is_there_as_found():
    pic = PIC(tiny_model("llama"), flops_per_byte=None)
    documents = [random_ids(20, seed=seed) for seed in range(4)]
    pic.compile_all(documents[:3])
    assert (pic.store.hits, pic.store.misses) == (0, 3)
    pic.compile_all(documents)
    assert (pic.store.hits, pic.store.misses) == (3, 4)


@pytest.mark.parametrize("eviction", ["lru", "cost"])
def test_a_store_that_is_too_small_for_all_compiles_none_twice(eviction, prefills):
    model = tiny_model("llama")
    room = 3 * 20 * PIC(model).hf.bytes_per_token
    pic = PIC(model, store=ChunkStore(device_bytes=room, eviction=eviction), flops_per_byte=None)
    documents = [random_ids(20, seed=seed) for seed in range(8)]
    prefills.clear()
    chunks = pic.compile_all(documents)
    assert sum(rows for rows, _ in prefills) == 8
    expected = PIC(model, flops_per_byte=None)
    right = expected.link(expected.compile_all(documents), random_ids(3), LegoLink(2))
    torch.testing.assert_close(
        pic.link(chunks, random_ids(3), LegoLink(2)).logits, right.logits, atol=1e-4, rtol=1e-4
    )


def test_documents_may_come_one_by_one_and_are_not_one_text():
    pic = PIC(tiny_model("llama"), flops_per_byte=None)
    documents = [random_ids(20, seed=seed) for seed in range(3)]
    assert pic.compile_all(iter(documents)) == pic.compile_all(documents)
    with pytest.raises(PICacheError, match="got one text of 3 characters"):
        pic.compile_all("cat")
    with pytest.raises(PICacheError, match="document 1"):
        pic.compile_all([[3, 4], []])


def test_nothing_is_stored_where_a_document_is_too_long():
    model = tiny_model("llama")
    store = ChunkStore()
    pic = PIC(model, store=store)
    long = random_ids(model.config.max_position_embeddings + 1, seed=0)
    with pytest.raises(PICacheError, match="split it into chunks"):
        pic.compile_all([DOCUMENTS[0], long])
    assert len(store) == 0
