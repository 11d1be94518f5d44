"""Forwards that a linked cache cannot serve: refused by their cause, with nothing half written."""

import copy
from contextlib import nullcontext

import pytest
import torch

from picache import PIC, PICacheError
from tests.helpers import assert_close, random_ids, tiny_model

FAMILIES = ["llama", "gemma3", "qwen2", "mistral_sliding"]
DTYPES = [torch.float32, torch.bfloat16]


def linked(family="llama", dtype=torch.float32, rows=1):
    pic = PIC(tiny_model(family, dtype=dtype))
    chunks = [pic.compile(random_ids(n, seed=n)) for n in (7, 12)]
    if rows == 1:
        return pic.model, pic.link(chunks, random_ids(5, seed=9))
    queries = [random_ids(5, seed=9), random_ids(3, seed=4)]
    return pic.model, pic.link([chunks, chunks[:1]], queries)


def held(cache):
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def unchanged(cache, before):
    return all(
        torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        for layer, (keys, values) in zip(cache.layers, before, strict=True)
    )


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_direct_forward_of_the_whole_prompt_names_its_logits(family, dtype, rows):
    model, prompt = linked(family, dtype, rows)
    with pytest.raises(PICacheError, match=r"whole text again behind.*are prompt\.logits"):
        model(**prompt)
    with torch.no_grad():
        by_hand = model(
            input_ids=prompt.input_ids[:, -1:],
            attention_mask=prompt.attention_mask,
            position_ids=prompt.attention_mask.sum(dim=1, keepdim=True) - 1,
            past_key_values=prompt.past_key_values,
        ).logits[:, -1]
    assert_close("logits", by_hand, prompt.logits, 1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_is_held_and_no_more_fed_again_is_refused(family, dtype):
    model, prompt = linked(family, dtype)
    cache = prompt.past_key_values
    before = held(cache)
    with pytest.raises(PICacheError, match=r"holds 23 tokens.*whole text again.*forward of 23"):
        model(prompt.input_ids[:, :-1], past_key_values=cache)
    assert unchanged(cache, before)


def test_the_token_that_is_held_alone_may_come_a_second_time():
    pic = PIC(tiny_model("llama"))
    prompt = pic.link([pic.compile([5])], [5])
    with torch.no_grad():
        expected = pic.model(torch.tensor([[5, 5]])).logits[:, -1]
        fed = pic.model(prompt.input_ids[:, -1:], past_key_values=prompt.past_key_values).logits
    assert_close("logits", fed[:, -1], expected, 1e-5)


def test_the_whole_chat_fed_to_a_used_cache_is_refused():
    model, prompt = linked()
    cache = prompt.past_key_values
    answer = model.generate(prompt.input_ids, past_key_values=cache, max_new_tokens=4)
    before = held(cache)
    whole = torch.cat([answer, random_ids(6, 1)], dim=1)
    with pytest.raises(PICacheError, match=r"holds 27 tokens.*whole text again.*forward of 34"):
        model(whole, past_key_values=cache)
    assert unchanged(cache, before)


def test_the_shortest_prompt_fed_again_is_refused():
    pic = PIC(tiny_model("llama"))
    prompt = pic.link([pic.compile([5])], [6])
    with pytest.raises(PICacheError, match="already holds 1 tokens"):
        pic.model(**prompt)
    assert pic.model.generate(**prompt, max_new_tokens=2).shape == (1, 4)


def test_a_prompt_serves_generate_any_number_of_times():
    model, prompt = linked()
    first, second = (model.generate(**prompt, max_new_tokens=5, do_sample=False) for _ in "12")
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_new_turn_is_no_prompt_fed_again(family):
    """Longer than all that is held, and beginning as the prompt does."""
    model, prompt = linked(family)
    cache = prompt.past_key_values
    answer = model.generate(
        prompt.input_ids, past_key_values=cache, max_new_tokens=3, do_sample=False
    )
    turn = torch.cat([answer, prompt.input_ids, random_ids(40, 1)], dim=1)
    mine = model.generate(turn, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert torch.equal(mine, model.generate(turn, max_new_tokens=3, do_sample=False))


def test_only_the_new_turn_is_no_new_token():
    model, prompt = linked()
    cache = prompt.past_key_values
    model.generate(prompt.input_ids, past_key_values=cache, max_new_tokens=3)
    before = held(cache)
    says = r"holds 26 tokens and the model was given no new ones.*pass the whole text as input_ids"
    with pytest.raises(PICacheError, match=says):
        model.generate(random_ids(4, 1), past_key_values=cache, max_new_tokens=3)
    assert unchanged(cache, before)


def test_use_cache_false_is_named():
    model, prompt = linked()
    with pytest.raises(PICacheError, match=r"does with use_cache=False.*Leave out use_cache"):
        model.generate(**prompt, use_cache=False, max_new_tokens=3)


def test_a_cache_that_refuses_beams_is_as_it_was():
    model, prompt = linked(rows=2)
    cache = prompt.past_key_values
    before = held(cache)
    rows = {
        name: prompt[name].repeat_interleave(3, dim=0) for name in ("input_ids", "attention_mask")
    }
    with pytest.raises(PICacheError, match="whole text again"):
        model(**rows, past_key_values=cache)
    assert unchanged(cache, before)
    assert model.generate(**prompt, num_beams=3, max_new_tokens=3).shape == (2, 27)


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@pytest.mark.parametrize("turn", ["first", "second"])
def test_another_dtype_than_the_prompt_was_linked_in_is_refused(how, turn):
    model, prompt = linked()
    cache, ids = prompt.past_key_values, prompt.input_ids
    if turn == "second":
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
        ids = torch.cat([ids, random_ids(4, 1)], dim=1)
    before = held(cache)
    around = torch.autocast("cpu", dtype=torch.bfloat16) if how == "autocast" else nullcontext()
    plain = copy.deepcopy(model)
    if how == "bfloat16":
        model.bfloat16()
    says = r"makes (keys|values) in torch.bfloat16, the linked cache holds them in torch.float32"
    with around, pytest.raises(PICacheError, match=says):
        model.generate(ids, past_key_values=cache, max_new_tokens=3)
    assert unchanged(cache, before)
    went_on = plain.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert torch.equal(went_on, plain.generate(ids, max_new_tokens=3, do_sample=False))
