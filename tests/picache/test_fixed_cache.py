"""What `generate` goes on from behind a captured pass: memory of fixed size, in the arena."""

import copy

import pytest
import torch
from transformers import CompileConfig

from picache import LegoLink, PICacheError
from picache.hf import captured_pass, fixed_memory
from tests.helpers import random_ids, tiny_model
from tests.picache.captured import assert_same, assert_same_kv, families, pic_and_parts


def fixed(pic, chunks, query):
    """A prompt whose caches are of fixed size, and what is generated behind it."""
    prompt = pic.link(chunks, query, LegoLink(3))
    assert prompt.past_key_values.is_compileable
    return prompt


RUN = dict(max_new_tokens=9, do_sample=False)


@pytest.mark.parametrize("family", ["Llama 3 (llama3 RoPE)", "Gemma 3", "Mistral (sliding)"])
@pytest.mark.parametrize("rows", [1, 2])
def test_generating_gives_what_it_gives_behind_a_growing_cache(family, rows, captured, eagerly):
    pic, chunks, query = pic_and_parts(families.build(family))
    both = ([chunks, chunks[1:]], [query, query.flip(0)])
    parts = (chunks, query) if rows == 1 else both
    prompt, growing = fixed(pic, *parts), eagerly(pic, *parts, LegoLink(3))
    beams = RUN | dict(num_beams=3, num_return_sequences=2)
    for options in (RUN, beams, RUN | dict(num_return_sequences=1)):
        expected = pic.model.generate(**growing, **options)
        for _ in range(2):
            assert torch.equal(pic.model.generate(**prompt, **options), expected)


def test_a_chat_goes_on_in_the_same_cache(captured, eagerly):
    pic, chunks, query = pic_and_parts(tiny_model("gemma3"))
    answers = []
    for prompt in (fixed(pic, chunks, query), eagerly(pic, chunks, query, LegoLink(3))):
        cache, ids = prompt.past_key_values, prompt.input_ids
        for turn in range(2):
            ids = pic.model.generate(ids, past_key_values=cache, **RUN)
            ids = torch.cat([ids, random_ids(11, 1, seed=turn)], dim=1)
        answers.append(ids)
        assert cache.get_seq_length() == ids.shape[1] - 12
        assert cache.layers[0].keys.shape[2] == ids.shape[1] - 12
    assert torch.equal(*answers)


@pytest.mark.parametrize("linked_meanwhile", [False, True])
def test_two_caches_of_one_prompt_do_not_disturb_each_other(linked_meanwhile, captured, eagerly):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    growing = eagerly(pic, chunks, query, LegoLink(3))
    prompt = fixed(pic, chunks, query)
    caches = [source.past_key_values for source in (prompt, prompt, growing)]
    ids = [prompt.input_ids] * 3
    for step in range(3):
        for which, cache in enumerate(caches):
            turn = random_ids(5, 1, seed=10 * step + (which == 1))
            ids[which] = torch.cat([ids[which], turn], dim=1) if which != 1 else ids[which]
            ids[which] = pic.model.generate(ids[which], past_key_values=cache, **RUN)
        if linked_meanwhile:
            pic.link(chunks[::-1], query)
    assert torch.equal(ids[0], ids[2])
    again, alone = prompt.input_ids, prompt.past_key_values
    for _ in range(3):
        again = pic.model.generate(again, past_key_values=alone, **RUN)
    assert torch.equal(ids[1], again)
    assert_same_kv(prompt.past_key_values, growing.past_key_values)


def test_more_room_is_made_where_a_text_outgrows_it(captured, eagerly, monkeypatch):
    """First within the arena, then beyond it."""
    monkeypatch.setattr("picache.hf.fixed_memory._ROOM", 2)
    monkeypatch.setattr(captured_pass, "_ROOM", 40)
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    prompt, growing = fixed(pic, chunks, query), eagerly(pic, chunks, query, LegoLink(3))
    places = pic.passes.arena.tokens
    sizes = []
    outs = []
    for source in (prompt, growing):
        cache = source.past_key_values
        ids = source.input_ids
        for _ in range(4):
            ids = pic.model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
            if source is prompt:
                sizes.append(cache.layers[0].memory.places)
        outs.append(ids)
    assert torch.equal(*outs)
    assert sizes[0] <= places < sizes[-1]
    assert_same(prompt, growing)


def test_garbage_in_the_arena_does_not_reach_what_is_decoded(captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    expected = pic.model.generate(**fixed(pic, chunks, query), **RUN)
    for keys, values in pic.passes.arena.places(1):
        keys.fill_(torch.nan)
        values.fill_(torch.nan)
    assert torch.equal(pic.model.generate(**fixed(pic, chunks, query), **RUN), expected)


@pytest.mark.parametrize("moved", [False, True])
def test_inference_mode_may_begin_and_end_anywhere(moved, captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    expected = pic.model.generate(**fixed(pic, chunks, query), **RUN)
    with torch.inference_mode():
        prompt = fixed(pic, chunks, query)
        cache, other = prompt.past_key_values, prompt.past_key_values
        ids = pic.model.generate(
            prompt.input_ids, past_key_values=cache, max_new_tokens=4, do_sample=False
        )
        pic.model.generate(
            prompt.input_ids, past_key_values=other, max_new_tokens=4, do_sample=False
        )
    if moved:
        pic.link(chunks[::-1], query)
    ids = ids.clone()
    for one in (cache, other):
        out = pic.model.generate(ids, past_key_values=one, max_new_tokens=5, do_sample=False)
        assert torch.equal(out, expected)
    assert torch.equal(pic.model.generate(**fixed(pic, chunks, query), **RUN), expected)


def test_a_copy_of_a_used_cache_goes_its_own_way(captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    prompt = fixed(pic, chunks, query)
    cache = prompt.past_key_values
    ids = pic.model.generate(prompt.input_ids, past_key_values=cache, **RUN)
    twin = copy.deepcopy(cache)
    largest = max(t.untyped_storage().nbytes() for kv in twin.layers[0].memory.layers for t in kv)
    assert largest == twin.layers[0].memory.layers[0][0].nbytes
    first, second = (pic.model.generate(ids, past_key_values=one, **RUN) for one in (cache, twin))
    assert torch.equal(first, second)


def test_a_forward_that_records_gradients_leaves_the_prompt_free_of_them(captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    prompt = fixed(pic, chunks, query)
    expected = pic.model.generate(**prompt, **RUN)
    cache = prompt.past_key_values
    out = pic.model(prompt.input_ids[:, -1:], past_key_values=cache).logits
    out.sum().backward()
    assert pic.model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    twin = copy.deepcopy(prompt)
    assert not any(t.requires_grad for kv in prompt.past_key_values.kv for t in kv)
    for one in (prompt, twin):
        assert torch.equal(pic.model.generate(**one, **RUN), expected)


def test_emptying_a_cache_is_refused_since_the_prompt_would_be_gone(captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    prompt = fixed(pic, chunks, query)
    before = prompt.past_key_values.kv
    with pytest.raises(PICacheError, match="not emptied"):
        prompt.past_key_values.reset()
    for ours, theirs in zip(prompt.past_key_values.kv, before, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_under_attention_that_takes_no_such_mask_a_cache_grows(captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    prompt = fixed(pic, chunks, query)
    pic.model.set_attn_implementation("flex_attention")
    assert not prompt.past_key_values.is_compileable


def test_a_cache_of_fixed_size_keeps_its_tensors(captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    layer = fixed(pic, chunks, query).past_key_values.layers[0]
    with pytest.raises(PICacheError, match="keeps its tensors"):
        layer.keys = layer.keys.clone()


def test_generate_compiles_one_step_for_all_prompts(captured):
    """Into one graph without breaks; what CUDA makes of it is measured there."""
    pic, chunks, query = pic_and_parts(tiny_model("gemma3"))
    how = CompileConfig(backend="eager", mode=None, fullgraph=True)
    how._compile_all_devices = True
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for parts in ((chunks, query), (chunks[::-1], query), (chunks[:3], query)):
        prompt = fixed(pic, *parts)
        expected = pic.model.generate(**prompt, **RUN)
        assert torch.equal(pic.model.generate(**prompt, **RUN, compile_config=how), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_rows_that_are_repeated_outgrow_the_places_shown(how, captured, eagerly, monkeypatch):
    monkeypatch.setattr(fixed_memory, "_ROOM", 8)
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    texts = []
    for link in (pic.link, lambda *args: eagerly(pic, *args)):
        prompt = link(chunks, query, LegoLink(3))
        torch.manual_seed(0)
        texts.append(pic.model.generate(**prompt, max_new_tokens=80, min_new_tokens=80, **how))
    assert torch.equal(*texts)


def test_a_cache_whose_rows_changed_does_not_change_its_prompt(captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    prompt = pic.link([chunks, chunks[:2]], [query, query], LegoLink(3))
    before = [(keys.clone(), values.clone()) for keys, values in prompt.past_key_values.kv]
    cache = prompt.past_key_values
    pic.model.generate(**prompt, max_new_tokens=2, do_sample=False)
    cache.reorder_cache(torch.tensor([1, 0]))
    pic.link(chunks, query, LegoLink(2))  # moves the prompt out of the arena
    for ours, theirs in zip(prompt.past_key_values.kv, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_warm_up_leaves_a_prompt_that_lives_alone(captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    prompt = pic.link(chunks, query, LegoLink(3))
    before = [(keys.clone(), values.clone()) for keys, values in prompt.past_key_values.kv]
    pic.warm_up(tokens=50, rows=16, batch=8, progress=False)
    for ours, theirs in zip(prompt.past_key_values.kv, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
