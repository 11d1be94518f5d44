"""Chunks side by side, against the definition written out on the model's own forward."""

import threading
from functools import cache as once

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from picache import APE, PIC, Combined, LegoLink, PICacheError, SharedPrefix
from tests.helpers import assert_close, random_ids, tiny_model

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3")
PREFIX = torch.tensor([1, 11, 12, 13, 14])
LENGTHS = (20, 33, 8)


@once
def pic_of(family):
    return PIC(tiny_model(family), sinks=SharedPrefix(tuple(PREFIX.tolist())))


def contexts(order=(0, 1, 2)):
    return [random_ids(LENGTHS[i], seed=i) for i in order], random_ids(6, seed=9)


def linked(pic, method, order=(0, 1, 2)):
    texts, query = contexts(order)
    chunks = [pic.compile(PREFIX, first=True), *(pic.compile(text) for text in texts)]
    return pic.link(chunks, query, method)


def by_definition(model, method, extra=()):
    """Contexts prefilled behind the prefix, the query over them all in one forward of the model."""
    texts, query = contexts()
    query = torch.cat([query, torch.tensor(extra, dtype=torch.int64)])
    start, count = len(PREFIX), sum(LENGTHS)
    caches = []
    for text in (PREFIX[:0], *texts):
        cache = DynamicCache()
        with torch.no_grad():
            model(torch.cat([PREFIX, text])[None], past_key_values=cache)
        caches.append(cache)
    whole = DynamicCache()
    for layer in range(4):
        parts = [caches[0].layers[layer]]
        keys = [parts[0].keys, *(c.layers[layer].keys[:, :, start:] for c in caches[1:])]
        values = [parts[0].values, *(c.layers[layer].values[:, :, start:] for c in caches[1:])]
        whole.update(torch.cat(keys, 2), torch.cat(values, 2), layer)

    def attention(module, q, k, v, mask, scaling, **_):
        """Two attentions, joined by their log-sum-exp."""
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = q @ k.mT * scaling + mask
        inner = scores[..., start : start + count] / method.temperature
        outer = torch.cat([scores[..., :start], scores[..., start + count :]], -1)
        v_inner = v[:, :, start : start + count]
        v_outer = torch.cat([v[:, :, :start], v[:, :, start + count :]], 2)
        weight_inner = (method.scale * inner.logsumexp(-1, keepdim=True)).exp()
        weight_outer = outer.logsumexp(-1, keepdim=True).exp()
        out = weight_inner * (inner.softmax(-1) @ v_inner) + weight_outer * (
            outer.softmax(-1) @ v_outer
        )
        return (out / (weight_inner + weight_outer)).transpose(1, 2), None

    AttentionInterface.register("ape_by_definition", attention)
    AttentionMaskInterface.register("ape_by_definition", eager_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = "ape_by_definition"
    positions = torch.arange(len(query)) + start + max(LENGTHS)
    try:
        with torch.no_grad():
            out = model(query[None], position_ids=positions[None], past_key_values=whole)
    finally:
        model.config._attn_implementation = before
    return out.logits[:, -1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [APE(), APE(1, 1), APE(0.5, 0.7)], ids=repr)
def test_equals_the_definition(family, method):
    pic = pic_of(family)
    prompt = linked(pic, method)
    assert_close("logits", prompt.logits, by_definition(pic.model, method), 1e-4)
    assert prompt.report.tokens_recomputed == 6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [APE(), APE(0.8, 1)], ids=repr)
def test_decoding_goes_on_as_linked(family, method):
    """Every token that generate gives is the one the definition gives for the longer query."""
    pic = pic_of(family)
    model, prompt = pic.model, linked(pic, method)
    with prompt.attached():
        out = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, -5:].tolist()
    for index, token in enumerate(out):
        assert by_definition(model, method, out[:index]).argmax().item() == token


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_the_chunks_does_not_matter(family):
    pic = pic_of(family)
    first, second = (linked(pic, APE(), order) for order in ((0, 1, 2), (2, 0, 1)))
    assert first["input_ids"].tolist() != second["input_ids"].tolist()
    assert_close("logits", second.logits, first.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_chunk_behind_the_prompts_own_prefix_is_a_full_prefill(family):
    pic = pic_of(family)
    model = pic.model
    text, query = random_ids(20, seed=1), random_ids(4, seed=2)
    chunks = [pic.compile(PREFIX, first=True), pic.compile(text)]
    prompt = pic.link(chunks, query, APE(1, 1))
    ids = torch.cat([PREFIX, text, query])[None]
    with torch.no_grad():
        assert_close("logits", prompt.logits, model(ids).logits[:, -1])
    with prompt.attached():
        out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert out.tolist() == model.generate(ids, max_new_tokens=8, do_sample=False).tolist()


def test_a_ragged_batch_and_beams_equal_their_rows():
    pic = pic_of("llama")
    model = pic.model
    system = pic.compile(PREFIX, first=True)
    rows = [
        [system, *(pic.compile(random_ids(n, seed=n)) for n in lengths)]
        for lengths in ((9, 30), (4,))
    ]
    queries = [random_ids(5, seed=5), random_ids(2, seed=6)]
    batch = pic.link(rows, queries, APE())
    options = dict(max_new_tokens=5, num_beams=2, do_sample=False)
    with batch.attached():
        out = model.generate(**batch, **options)[:, -5:].tolist()
    for index, (row, query) in enumerate(zip(rows, queries, strict=True)):
        alone = pic.link(row, query, APE())
        assert torch.equal(alone.logits[0], batch.logits[index])
        with alone.attached():
            assert model.generate(**alone, **options)[0, -5:].tolist() == out[index]


def test_a_scale_asks_to_be_attached_and_leaves_nothing_behind():
    pic = pic_of("llama")
    model = pic.model
    implementation = model.config._attn_implementation
    prompt = linked(pic, APE())
    with pytest.raises(PICacheError, match=r"with prompt\.attached\(\)"):
        model.generate(**prompt, max_new_tokens=2)
    with prompt.attached():
        model.generate(**prompt, max_new_tokens=2)
    assert model.config._attn_implementation == implementation
    plain = linked(pic, LegoLink(2))
    assert "position_ids" not in plain
    with plain.attached():
        assert model.config._attn_implementation == implementation


def test_positions_are_right_without_position_ids_and_in_the_next_turn():
    """A cache alone does not say that positions lag behind places; what is attached does."""
    pic = pic_of("llama")
    model, method, prompt = pic.model, APE(0.8, 0.9), linked(pic_of("llama"), APE(0.8, 0.9))
    inputs = {name: prompt[name] for name in ("input_ids", "attention_mask")}
    cache = prompt["past_key_values"]
    with prompt.attached():
        bare = model.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False)
        given = model.generate(**prompt, max_new_tokens=3, do_sample=False)
        assert bare.tolist() == given.tolist()
        turn = torch.cat([bare, random_ids(4, 1, seed=3)], dim=1)
        out = model.generate(turn, past_key_values=cache, max_new_tokens=1, do_sample=False)
    said = turn[0, prompt["input_ids"].shape[1] :].tolist()
    assert by_definition(model, method, said).argmax().item() == out[0, -1].item()


def test_while_attached_the_model_is_for_that_prompt_alone():
    pic = pic_of("llama")
    model, prompt = pic.model, linked(pic_of("llama"), APE())
    pic = PIC(model, sinks=SharedPrefix(tuple(PREFIX.tolist())))
    with prompt.attached():
        with pytest.raises(PICacheError, match="attached to a prompt: compile and link outside"):
            pic.compile(random_ids(30, seed=77))
        with pytest.raises(PICacheError, match="without the prompt's cache"):
            model(random_ids(9, 1))
        with pytest.raises(PICacheError, match="another prompt is attached"), prompt.attached():
            pass
    assert model(random_ids(9, 1)).logits.isfinite().all()
    assert not pic.hf.decoder._forward_pre_hooks


def test_generation_may_run_in_another_thread_while_attached():
    pic = pic_of("llama")
    model, prompt, out = pic.model, linked(pic_of("llama"), APE()), []
    model = pic.model
    options = dict(max_new_tokens=4, do_sample=False)
    with prompt.attached():
        here = model.generate(**prompt, **options)
        thread = threading.Thread(target=lambda: out.append(model.generate(**prompt, **options)))
        thread.start()
        thread.join()
    assert out[0].tolist() == here.tolist()


@pytest.mark.parametrize("family", ["mistral_sliding", "gemma3"])
def test_windows_are_refused(family):
    pic = pic_of(family)
    with pytest.raises(PICacheError, match="window of 16 tokens"):
        linked(pic, APE())
    assert linked(pic, LegoLink(2)).logits.isfinite().all()


def test_bad_arguments():
    for bad in (0, 1.5, "a", True, float("nan")):
        with pytest.raises(PICacheError, match="APE needs a temperature over 0 and up to 1"):
            APE(temperature=bad)
        with pytest.raises(PICacheError, match="APE needs a scale over 0 and up to 1"):
            APE(scale=bad)
    with pytest.raises(PICacheError, match="more than one set of tokens"):
        Combined((LegoLink(1), APE()))
