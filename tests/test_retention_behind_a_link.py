"""A `SparseCache` that goes on from a linked prompt in an arena takes it over without a copy."""

import copy

import pytest
import torch
from transformers import DynamicCache

from picache import APE, PIC, LegoLink, PICacheError, ProphetKV
from picache.hf import recorders
from sparsity import Full, RaaS, SnapKV, SparseCache, detach
from tests.helpers import random_ids, tiny_model

RUN = dict(max_new_tokens=24, do_sample=False)


@pytest.fixture
def linking(monkeypatch):
    """A PIC whose passes are recorded on the CPU, and what to link."""
    monkeypatch.setitem(recorders.RECORDERS, "cpu", recorders.RunAgain)
    pic = PIC(tiny_model("llama"), flops_per_byte=None)
    chunks = [pic.compile(random_ids(30, seed=seed)) for seed in (1, 2, 3)]
    yield pic, chunks, random_ids(7, seed=4)
    detach(pic.model)


@pytest.mark.parametrize("policy", [Full(), RaaS(64, page_size=4, pin_prompt=False)], ids=str)
@pytest.mark.parametrize("linked_meanwhile", [False, True])
def test_it_is_taken_over_as_it_lies_and_stays_right(
    policy, linked_meanwhile, linking, monkeypatch
):
    pic, chunks, query = linking
    prompt = pic.link(chunks, query, LegoLink(3))
    assert prompt.report.recompute_pass.startswith("captured,")
    lies = pic.passes.arena.places(1)
    past = prompt.past_key_values
    cache = SparseCache(pic.model, policy, past=past)
    taken = {layer: retention.held for layer, retention in cache.retentions.items()}
    for layer, (keys, values) in taken.items():
        assert keys.data_ptr() == lies[layer][0].data_ptr()
        assert values.data_ptr() == lies[layer][1].data_ptr()
    ids = prompt.input_ids
    del past, prompt, taken, keys, values
    if linked_meanwhile:
        pic.link(chunks[::-1], query.flip(0), LegoLink(3))
    answer = pic.model.generate(ids, past_key_values=cache, **RUN)
    with monkeypatch.context() as patch:
        patch.delitem(recorders.RECORDERS, "cpu")
        growing = pic.link(chunks, query, LegoLink(3)).past_key_values
    again = SparseCache(pic.model, policy, past=growing)
    assert torch.equal(answer, pic.model.generate(ids, past_key_values=again, **RUN))


def test_an_attached_model_decodes_a_linked_prompt_in_a_growing_cache(linking):
    pic, chunks, query = linking
    prompt = pic.link(chunks, query, LegoLink(3))
    expected = pic.model.generate(**prompt, **RUN)
    SparseCache(pic.model, Full())
    assert not prompt.past_key_values.is_compileable
    assert torch.equal(pic.model.generate(**prompt, **RUN), expected)
    again = pic.link(chunks, query, LegoLink(3))
    assert again.report.recompute_pass.startswith("captured,")
    assert torch.equal(pic.model.generate(**again, **RUN), expected)


def test_a_prompt_whose_method_changes_attention_is_not_taken_over():
    """Its keys alone would be decoded at other positions, by the model's own attention."""
    pic = PIC(tiny_model("llama"))
    prompt = pic.link([pic.compile(random_ids(9, seed=1))], random_ids(4, seed=4), APE())
    with pytest.raises(PICacheError, match="with the prompt's own cache"):
        SparseCache(pic.model, Full(), past=prompt.past_key_values)


@pytest.mark.parametrize("on_an_arena", [False, True])
@pytest.mark.parametrize("method", [LegoLink(3), ProphetKV(0.3)], ids=str)
def test_a_policy_sees_the_query_behind_what_was_linked_for_it(
    method, on_an_arena, linking, monkeypatch
):
    """The pages as the method linked them for the whole query, which is computed anew behind."""
    pic, chunks, query = linking
    if not on_an_arena:
        monkeypatch.delitem(recorders.RECORDERS, "cpu")
    prompt = pic.link(chunks, query, method)
    assert prompt.report.recompute_pass.startswith("captured" if on_an_arena else "eager")
    before, whole = prompt.past_before_query, prompt.past_key_values
    tokens = prompt.input_ids.shape[1] - len(query)
    assert before.get_seq_length() == tokens
    for (keys, values), (all_keys, all_values) in zip(before.kv, whole.kv, strict=True):
        assert torch.equal(keys, all_keys[:, :, :tokens])
        assert torch.equal(values, all_values[:, :, :tokens])
    policy = SnapKV(24, window=4, evict_every=8)
    asked = dict(attention_mask=prompt.attention_mask, **RUN)

    def decoded(past):
        cache = SparseCache(pic.model, policy, past=past)
        text = pic.model.generate(prompt.input_ids, past_key_values=cache, **asked)
        return text, cache

    text, cache = decoded(before)
    plain = DynamicCache()
    for layer, (keys, values) in enumerate(whole.kv):
        plain.update(keys[:, :, :tokens].clone(), values[:, :, :tokens].clone(), layer)
    expected, other = decoded(plain)
    assert torch.equal(text, expected)
    assert cache.report().tokens_kept == other.report().tokens_kept
    # Another prompt in the same memory leaves what was handed out as it was.
    again = prompt.past_before_query
    pic.link(chunks[::-1], query.flip(0), method)
    assert torch.equal(decoded(again)[0], expected)
    # Without a policy it is the prompt again.
    full = pic.model.generate(prompt.input_ids, past_key_values=prompt.past_before_query, **asked)
    assert torch.equal(full, pic.model.generate(**prompt, **RUN))


def test_in_a_batch_the_shortest_query_says_how_much_is_before_it(linking):
    pic, chunks, query = linking
    prompt = pic.link([chunks, chunks[:2]], [query, query[:4]], LegoLink(3))
    before = prompt.past_before_query
    assert before.get_seq_length() == prompt.input_ids.shape[1] - 4
    asked = dict(attention_mask=prompt.attention_mask, **RUN)
    text = pic.model.generate(prompt.input_ids, past_key_values=before, **asked)
    assert torch.equal(text, pic.model.generate(**prompt, **RUN))
    moved = copy.deepcopy(prompt).to("cpu").past_before_query
    assert all(
        torch.equal(one, other)
        for pair in zip(moved.kv, prompt.past_before_query.kv, strict=True)
        for one, other in zip(*pair, strict=True)
    )
