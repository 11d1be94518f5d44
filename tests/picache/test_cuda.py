"""On a CUDA device: the same results, chunks from every tier, loading beside recomputing."""

import math

import pytest
import torch

from picache import (
    A3,
    APE,
    PIC,
    CacheBlend,
    ChunkStore,
    FullRecompute,
    LegoLink,
    NaiveReuse,
    ProphetKV,
    RandomRecompute,
)
from picache.linking.linked_kv import LinkedKV
from picache.store import together
from tests.helpers import CONFIGS, assert_close, random_ids, tiny_model
from tests.picache.helpers import chunks_of, compiled, full_logits, pic_of, prompt_parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (7, 60, 33, 1, 90)
SLEEP_CYCLES = 100_000_000  # some 50 ms: far longer than anything these tiny models do


def linked(pic, method):
    documents, query = prompt_parts(LENGTHS)
    return pic.link(compiled(pic, documents), query, method)


def own_logits(model):
    """Of the same prompt, by the model alone."""
    documents, query = prompt_parts(LENGTHS)
    return full_logits(model, torch.cat([*documents, query]))


@pytest.mark.parametrize("family", CONFIGS)
def test_recompute_all_is_a_full_prefill(family):
    pic = pic_of(family, device="cuda")
    logits = linked(pic, FullRecompute()).logits
    assert logits.is_cuda
    assert_close("logits", logits, own_logits(pic.model))


@pytest.mark.parametrize(
    "method",
    [
        NaiveReuse(),
        NaiveReuse(force_query=False),
        LegoLink(3),
        RandomRecompute(3),
        CacheBlend(0.3),
        CacheBlend.lmcache(0.3),
        A3(0.3),
        ProphetKV(0.3, value_norm=True),
        APE(),
    ],
    ids=str,
)
def test_a_method_gives_what_it_gives_on_the_cpu(method):
    there, here = (linked(pic_of("llama", device=device), method) for device in ("cuda", "cpu"))
    assert_close("logits", there.logits.cpu(), here.logits, ratio=1e-3)
    for layers in zip(there["past_key_values"].layers, here["past_key_values"].layers, strict=True):
        for name in ("keys", "values"):
            assert_close(name, *(getattr(layer, name).cpu() for layer in layers), ratio=1e-3)
    assert there.report.tokens_recomputed_per_layer == here.report.tokens_recomputed_per_layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_close_to_a_full_prefill(dtype):
    model = tiny_model("qwen3", dtype=dtype).to("cuda")
    logits = linked(PIC(model, flops_per_byte=None), FullRecompute()).logits
    assert_close("logits", logits, own_logits(model), ratio=0.05)


def test_generating_goes_on_from_a_batch():
    pic = pic_of("llama", device="cuda")
    chunks = chunks_of(pic, 12, 40, 25)
    queries = [random_ids(5, seed=1), random_ids(11, seed=2)]
    rows = [chunks, chunks[:2]]
    both = pic.link(rows, queries, LegoLink(4))
    out = pic.model.generate(**both, max_new_tokens=12, do_sample=False)
    for row, (some, query) in enumerate(zip(rows, queries, strict=True)):
        alone = pic.link(some, query, LegoLink(4))
        one = pic.model.generate(**alone, max_new_tokens=12, do_sample=False)
        assert out[row, -12:].tolist() == one[0, -12:].tolist()


@pytest.mark.parametrize("storage", ["exact", "int8", "fp8"])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_link_from_a_slower_tier_is_the_same_to_the_bit(tier, storage, tmp_path, monkeypatch):
    """Also when copying takes long: who reads too early would read what is not there yet."""
    model = tiny_model("gemma3").to("cuda")
    expected = linked(PIC(model, store=ChunkStore(storage=storage)), LegoLink(3)).logits
    slower = {"host": {"host_bytes": math.inf}, "disk": {"path": tmp_path}}[tier]
    pic = PIC(model, store=ChunkStore(device_bytes=1, storage=storage, **slower))
    linked(pic, LegoLink(3))
    original = LinkedKV._copied

    def slowly(self, layer, parts):
        torch.cuda._sleep(SLEEP_CYCLES)
        return original(self, layer, parts)

    monkeypatch.setattr(LinkedKV, "_copied", slowly)
    prompt = linked(pic, LegoLink(3))
    assert all(prompt.report.chunk_hits)
    assert torch.equal(prompt.logits, expected)


def test_the_next_layer_is_copied_while_this_one_is_computed(monkeypatch):
    """Layer 1 is in place on the device before the device is done with a long layer 0."""
    monkeypatch.setattr(together, "MOST_LAYERS", 1)  # as where layers are large
    model = tiny_model("llama").to("cuda")
    pic = PIC(model, store=ChunkStore(device_bytes=1, host_bytes=math.inf))
    linked(pic, LegoLink(3))
    marks = {}

    def mark(name):
        marks[name] = torch.cuda.Event(enable_timing=True)
        marks[name].record()

    original = LinkedKV._make

    def watched(self, layer):
        kv = original(self, layer)
        if layer == 1:
            with torch.cuda.stream(self._stream):
                mark("layer 1 is in place")
        return kv

    def long(*_):
        torch.cuda._sleep(SLEEP_CYCLES)
        mark("layer 0 is done")

    documents, query = prompt_parts(LENGTHS)
    chunks = compiled(pic, documents)
    monkeypatch.setattr(LinkedKV, "_make", watched)
    handle = pic.hf.decoder.layers[0].mlp.register_forward_hook(long)
    try:
        report = pic.link(chunks, query, LegoLink(3)).report
    finally:
        handle.remove()
    torch.cuda.synchronize()
    assert marks["layer 1 is in place"].elapsed_time(marks["layer 0 is done"]) > 0
    assert report.seconds["load"] > 0
    assert report.seconds["rotate"] > 0


def test_a_chunk_wider_than_the_device_tier_stays_on_the_host():
    model = tiny_model("llama").to("cuda")
    store = ChunkStore(device_bytes=1, host_bytes=math.inf)
    pic = PIC(model, store=store)
    linked(pic, LegoLink(3))
    chunk = pic.compile(random_ids(LENGTHS[1], seed=1))
    held = store.get(chunk.key)
    assert held.tier == "host"
    assert all(tensor.is_pinned() for layer in held for tensor in layer)
    moved = held.layer(0, model.device)
    assert all(tensor.is_cuda for tensor in moved)
    assert torch.equal(moved[0].cpu(), held.layer(0)[0])


def test_masks_and_scores_never_grow_with_the_square_of_the_prompt():
    """A prompt of 8,192 tokens links in far less than one mask of its square would take."""
    model = tiny_model("llama", max_position_embeddings=16384).to("cuda")
    pic = PIC(model, flops_per_byte=None)
    chunks = [pic.compile(random_ids(2048, seed=seed)) for seed in range(4)]
    query = random_ids(16, seed=9)
    pic.link(chunks, query, LegoLink(16))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prompt = pic.link(chunks, query, LegoLink(16))
    tokens = prompt["input_ids"].shape[1]
    assert torch.cuda.max_memory_allocated() - before < tokens * tokens
