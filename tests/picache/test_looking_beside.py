"""A replay begins before the model is looked at; what has changed is noticed all the same."""

import gc

import pytest
import torch
from torch import nn

from picache import ChunkStore, LegoLink, PICacheError, ProphetKV
from picache.hf.captured_pass import CapturedPasses
from picache.hf.model import HFModel
from picache.hf.weights_in_memory import WeightsInMemory
from picache.linking.link import Link
from tests.helpers import tiny_model
from tests.picache.captured import assert_same, pic_and_parts
from tests.picache.helpers import compiled, prompt_parts


@pytest.fixture
def order(monkeypatch):
    """What a link does, in order: "look" at the model, "run" a captured pass."""
    seen = []
    for owner, name, label in (
        (HFModel, "header", "look"),
        (CapturedPasses, "run", "run"),
        (Link, "_recompute", "eager"),
    ):
        before = getattr(owner, name)

        def noted(self, *args, _before=before, _label=label, **options):
            seen.append(_label)
            return _before(self, *args, **options)

        monkeypatch.setattr(owner, name, noted)
    return seen


METHOD = LegoLink(3)


def linked(pic, chunks, query, method=METHOD):
    return pic.link(chunks, query, method)


@pytest.mark.parametrize("method", [LegoLink(3), ProphetKV(0.3)], ids=str)
def test_the_model_is_looked_at_beside_a_replay(method, captured, order):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    for expected in (["look", "run"], ["run", "look"], ["run", "look"]):
        order.clear()
        linked(pic, chunks, query, method)
        assert order == expected


def test_it_is_looked_at_first_where_nothing_is_replayed(captured, eagerly, order):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    order.clear()
    eagerly(pic, chunks, query, LegoLink(3))
    assert order == ["look", "eager"]


def test_it_is_looked_at_first_where_a_chunk_is_not_on_the_device(captured, order, tmp_path):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    linked(pic, chunks, query)
    pic.store = ChunkStore(path=tmp_path)
    order.clear()
    linked(pic, chunks, query)  # compiles them again
    assert order[0] == "look"


@pytest.mark.parametrize("in_place", [False, True])
def test_other_weights_are_noticed_and_nothing_of_them_is_stored(in_place, captured, order):
    model = tiny_model("llama")
    pic, chunks, query = pic_and_parts(model)
    linked(pic, chunks, query)
    layer = model.model.layers[0].mlp.up_proj
    kept = layer.weight
    if in_place:
        with torch.no_grad():
            kept.mul_(2)
    else:
        layer.weight = nn.Parameter(kept * 2)
    order.clear()
    held = len(pic.store)
    with pytest.raises(PICacheError, match="compiled with another model, dtype, weights"):
        linked(pic, chunks, query)
    # The old one is kept here, so that the replay could begin; the look beside it tells.
    assert order == ["run", "look", "look"]
    pic.store.clear()
    with pytest.raises(PICacheError, match="compiled with another model, dtype, weights"):
        linked(pic, chunks, query)
    assert held
    assert not len(pic.store)


def test_chunks_of_other_weights_are_linked_with_them(captured, eagerly, order):
    model = tiny_model("llama")
    pic, chunks, query = pic_and_parts(model)
    linked(pic, chunks, query)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    other, again, _ = pic_and_parts(model)  # compiled elsewhere: `pic` has not looked since
    other.store, pic.store = pic.store, other.store
    prompt = linked(pic, again, query)
    assert_same(prompt, eagerly(pic, again, query, LegoLink(3)))


def trained(model, _):
    model.train()


def moved(model, monkeypatch):
    model.to(torch.float64)


def in_autocast(model, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)


@pytest.mark.parametrize(
    ("change", "message"),
    [(trained, "training mode"), (moved, "float64"), (in_autocast, "autocast")],
)
def test_a_state_that_is_refused_is_refused_beside_a_replay(change, message, captured, monkeypatch):
    model = tiny_model("llama")
    pic, chunks, query = pic_and_parts(model)
    linked(pic, chunks, query)
    change(model, monkeypatch)
    with pytest.raises(PICacheError, match=message):
        linked(pic, chunks, query)


def test_settings_that_changed_are_measured_and_linked_with(captured, eagerly):
    model = tiny_model("llama")
    pic, chunks, query = pic_and_parts(model)
    linked(pic, chunks, query)
    model.config.rms_norm_eps = 0.5
    with pytest.raises(PICacheError, match="compiled with another model"):
        linked(pic, chunks, query)
    documents, question = prompt_parts()
    again = compiled(pic, documents)
    assert_same(linked(pic, again, question), eagerly(pic, again, question, LegoLink(3)))


def test_an_earlier_prompt_outlives_a_link_that_was_refused(captured):
    model = tiny_model("llama")
    pic, chunks, query = pic_and_parts(model)
    first = linked(pic, chunks, query)
    kept = [(keys.clone(), values.clone()) for keys, values in first.past_key_values.kv]
    model.train()
    with pytest.raises(PICacheError, match="training mode"):
        linked(pic, chunks[::-1], query)
    model.eval()
    for (keys, values), (had, held) in zip(first.past_key_values.kv, kept, strict=True):
        assert torch.equal(keys, had)
        assert torch.equal(values, held)
    other = linked(pic, chunks[:3], query)
    assert other.logits.isfinite().all()


def test_weights_lie_in_memory_until_they_are_replaced_or_moved():
    layer = nn.Linear(3, 5)
    place = WeightsInMemory(layer.parameters())
    assert place.as_seen
    with torch.no_grad():
        layer.weight.mul_(2)
    assert place.as_seen
    layer.weight.data = layer.weight.data.clone()
    assert not place.as_seen
    place = WeightsInMemory(layer.parameters())
    layer.bias = nn.Parameter(torch.zeros(5))
    gc.collect()
    assert not place.as_seen
    place = WeightsInMemory(layer.parameters())
    layer.to(torch.float64)
    assert not place.as_seen


class Wrapped(nn.Parameter):
    """Stands for a quantised weight, a subclass that holds others."""


def test_weights_that_wrap_others_never_count_as_seen():
    assert not WeightsInMemory([Wrapped(torch.zeros(3))]).as_seen
