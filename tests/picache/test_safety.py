"""What must never happen in silence: other weights, other threads, a full store, a broken disk."""

import os
import threading

import pytest
import torch

from picache import (
    PIC,
    CacheBlend,
    ChunkStore,
    DummySinks,
    LegoLink,
    NaiveReuse,
    PICacheError,
    ProphetKV,
)
from picache.linking.linked_kv import LinkedKV
from tests.helpers import assert_close, random_ids, tiny_model
from tests.picache.helpers import chunks_of, compiled


def trade(tensor, a, b):
    with torch.no_grad():
        tensor[[a, b]] = tensor[[b, a]]


@pytest.mark.parametrize(("a", "b"), [(3, 45), (3, 4), (0, 126)])
def test_rows_that_trade_places_are_another_model(a, b):
    ids, model = random_ids(7), tiny_model("llama")
    key = PIC(model).compile(ids).key
    trade(model.model.embed_tokens.weight, a, b)
    assert PIC(model).compile(ids).key != key


def test_a_write_through_data_is_seen():
    model = tiny_model("llama")
    pic = PIC(model)
    chunk = pic.compile(random_ids(9))
    for parameter in model.model.layers[0].mlp.parameters():
        parameter.data += 1
    assert pic.compile(random_ids(9)).key != chunk.key
    with pytest.raises(PICacheError, match="another model, dtype, weights"):
        pic.link([chunk], random_ids(2))


def test_a_model_made_in_inference_mode_links():
    with torch.inference_mode():
        model = tiny_model("llama")
    pic = PIC(model)
    assert pic.link([pic.compile(random_ids(9))], random_ids(2)).logits.isfinite().all()


def test_threads_take_turns_and_leave_the_model_as_it_was():
    model = tiny_model("llama")
    implementation = model.config._attn_implementation
    ids = [random_ids(n, seed=n) for n in (5, 14, 9)]
    expected = {}
    for seed in (1, 2):
        pic = PIC(model)
        expected[seed] = pic.link(compiled(pic, ids), random_ids(3, seed=seed)).logits
    wrong = []

    def work(seed):
        try:
            for _ in range(8):
                pic = PIC(model)
                chunks = compiled(pic, ids)
                logits = pic.link(chunks, random_ids(3, seed=seed), CacheBlend(0.3)).logits
                logits = pic.link(chunks, random_ids(3, seed=seed)).logits
                if not torch.equal(logits, expected[seed]):
                    wrong.append(seed)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model.config._attn_implementation == implementation
    assert model(random_ids(4, 1)).logits.isfinite().all()


def test_a_link_goes_on_when_the_store_has_no_room():
    model = tiny_model("llama")
    texts = [random_ids(20, seed=s) for s in (1, 2)]
    roomy = PIC(model)
    expected = roomy.link(compiled(roomy, texts), random_ids(3)).logits
    store = ChunkStore(device_bytes=roomy.hf.bytes_per_token * 20)
    pic = PIC(model, store=store)
    chunks = compiled(pic, texts)
    store.pin(chunks[1].key)
    prompt = pic.link(chunks, random_ids(3))
    assert torch.equal(prompt.logits, expected)
    assert prompt.report.chunk_hits == (False, True)
    assert chunks[1].key in store
    with pytest.raises(PICacheError, match="pinned or in use"):
        pic.compile(texts[0])


def test_a_disk_that_fails_is_not_a_damaged_file(tmp_path, monkeypatch):
    model = tiny_model("llama")
    texts = [random_ids(20, seed=s) for s in (1, 2)]
    first = PIC(model, store=ChunkStore(path=tmp_path))
    expected = first.link(compiled(first, texts), random_ids(3)).logits
    store = ChunkStore(device_bytes=1, path=tmp_path)
    pic = PIC(model, store=store)
    chunks = compiled(pic, texts)
    files = sorted(tmp_path.rglob("*.safetensors"))
    from picache.store.chunkfile import ChunkFile

    def failing(self, index):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(ChunkFile, "layers", failing)
        prompt = pic.link(chunks, random_ids(3))
    assert torch.equal(prompt.logits, expected)
    assert prompt.report.chunk_hits == (False, False)
    assert store.corrupt == 0
    assert sorted(tmp_path.rglob("*.safetensors")) == files


def test_a_file_of_another_user_can_be_read(tmp_path, monkeypatch):
    model = tiny_model("llama")
    PIC(model, store=ChunkStore(path=tmp_path)).compile(random_ids(9))

    def denied(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", denied)
    store = ChunkStore(path=tmp_path)
    PIC(model, store=store).compile(random_ids(9))
    assert store.hits == 1


def test_a_damaged_chunk_that_stands_twice_is_counted_once(tmp_path):
    model = tiny_model("llama")
    first = PIC(model, store=ChunkStore(path=tmp_path))
    a, b = (first.compile(random_ids(20, seed=s)) for s in (1, 2))
    expected = first.link([a, b, b], random_ids(3)).logits
    (file,) = tmp_path.rglob(f"{b.key}*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    store = ChunkStore(device_bytes=1, path=tmp_path)
    prompt = PIC(model, store=store).link([a, b, b], random_ids(3))
    assert torch.equal(prompt.logits, expected)
    assert store.corrupt == 1
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_reduced_storage_gives_the_same_before_and_after():
    pic = PIC(tiny_model("llama"), store=ChunkStore(storage="int8"))
    texts = [random_ids(20, seed=s) for s in (1, 2)]
    chunks = compiled(pic, texts)
    hit = pic.link(chunks, random_ids(3)).logits
    pic.store.clear()
    missed = pic.link(chunks, random_ids(3))
    assert missed.report.misses == 2
    assert_close("logits", missed.logits, hit, 1e-6)


def test_sinks_count_against_the_models_positions():
    pic = PIC(tiny_model("llama"), sinks=DummySinks(4))
    first, middle = pic.compile(random_ids(1)), pic.compile(random_ids(510), first=True)
    with pytest.raises(PICacheError, match="behind its sinks, has 514 tokens"):
        pic.link([first, middle], random_ids(1))


def test_a_repeated_pair_of_tokens_is_no_prompt_fed_again():
    """Large key biases, as in Qwen2.5, make keys of one token alike wherever it stands."""
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias.view(2, 16)[:, [7, 15]] = 40
    pic = PIC(model)
    last = 60
    chunks = [pic.compile(torch.tensor([5, 6, last, 50, 7, 8])), pic.compile(random_ids(12))]
    prompt = pic.link(chunks, torch.tensor([9, last]))
    cache = prompt["past_key_values"]
    assert model(torch.tensor([[last, 50, 61]]), past_key_values=cache).logits.isfinite().all()
    again = prompt["past_key_values"]
    with pytest.raises(PICacheError, match="some of them again"):
        model(prompt["input_ids"], position_ids=torch.arange(20)[None], past_key_values=again)


def test_seconds_are_those_of_their_part(monkeypatch):
    """Layers that come slowly while the method looks do not make recomputing free."""
    import time

    original = LinkedKV._make

    def slow(self, layer):
        time.sleep(0.05)
        return original(self, layer)

    monkeypatch.setattr(LinkedKV, "_make", slow)
    pic = PIC(tiny_model("llama"))
    chunks = chunks_of(pic, 9, 80)
    seconds = pic.link(chunks, random_ids(40), ProphetKV(0.5)).report.seconds
    assert seconds["recompute"] > 0
    assert 0 < seconds["choose"] < 0.2


def test_a_query_compiled_alone_costs_what_it_costs():
    pic = PIC(tiny_model("llama"), flops_per_byte=None)
    chunks = chunks_of(pic, 9, 30)
    naive = pic.link(chunks, random_ids(100), NaiveReuse()).report
    reused = pic.link(chunks, random_ids(100), NaiveReuse(force_query=False)).report
    assert 0.5 * naive.flops < reused.flops < naive.flops


def test_bytes_are_those_that_were_copied():
    pic = PIC(tiny_model("llama"), sinks=DummySinks(4))
    chunks = [pic.compile(random_ids(9), first=True), pic.compile(random_ids(30, seed=2))]
    report = pic.link(chunks, random_ids(3), LegoLink(2)).report
    assert report.bytes_loaded == pic.hf.bytes_per_token * 39


def test_prompts_compare_by_identity():
    pic = PIC(tiny_model("llama"))
    chunk = pic.compile(random_ids(9))
    one, two = (pic.link([chunk], random_ids(2)) for _ in range(2))
    assert one == one
    assert one != two
    assert len({one, two}) == 2
