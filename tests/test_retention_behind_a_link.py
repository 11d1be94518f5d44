"""A `SparseCache` that goes on from a linked prompt in an arena takes it over without a copy."""

import pytest
import torch

from picache import APE, PIC, LegoLink, PICacheError
from picache.hf import recorders
from sparsity import Full, RaaS, SparseCache, detach
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
