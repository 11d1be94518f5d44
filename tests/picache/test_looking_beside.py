"""A replay begins before the model is looked at; what has changed is noticed all the same."""

import gc
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from picache import (
    PIC,
    ChunkStore,
    LegoLink,
    NaiveReuse,
    OracleDeviation,
    PICacheError,
    ProphetKV,
)
from picache.hf import model as hf_model
from picache.hf import recorders
from picache.hf.captured_pass import CapturedPasses
from picache.hf.model import HFModel
from picache.hf.weights_in_memory import WeightsInMemory
from picache.linking.link import Link
from tests.helpers import tiny_model
from tests.picache.captured import assert_same, pic_and_parts
from tests.picache.helpers import compiled, prompt_parts
from tests.picache.taped import Taped


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


@pytest.fixture
def taped(monkeypatch):
    """Passes are recorded on a CPU, and their replay runs no Python; what it did, in order."""
    runs = []
    monkeypatch.setattr(Taped, "runs", runs, raising=False)
    monkeypatch.setitem(recorders.RECORDERS, "cpu", Taped)
    return runs


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


def trained(model, outside):
    model.train()


def moved(model, outside):
    model.to(torch.float64)


def in_autocast(model, outside):
    outside.enter_context(torch.autocast("cpu", torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [(trained, "training mode"), (moved, "float64"), (in_autocast, "autocast")],
)
def test_a_state_that_is_refused_is_refused_beside_a_replay(change, message, captured):
    model = tiny_model("llama")
    pic, chunks, query = pic_and_parts(model)
    linked(pic, chunks, query)
    with ExitStack() as outside:
        change(model, outside)
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


class Adapter(nn.Module):
    """A branch with dropout beside a layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.drop = base, nn.Dropout(0.5)
        self.down = nn.Parameter(0.1 * torch.randn(4, base.in_features))
        self.up = nn.Parameter(0.5 * torch.randn(base.out_features, 4))

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.drop(x) @ self.down.T @ self.up.T


@pytest.mark.parametrize("warm", [False, True])
def test_nothing_is_recorded_or_proven_in_a_state_that_is_refused(warm, taped):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = Adapter(layer.mlp.up_proj)
    model.eval()
    pic, chunks, query = pic_and_parts(model)
    linked(pic, chunks, query)
    if warm:  # recorded, and not yet held against the pass itself
        pic.warm_up(tokens=128, rows=64, progress=False)
    taped.clear()
    model.train()
    with pytest.raises(PICacheError, match="training mode"):
        linked(pic, chunks, query, LegoLink(12))
    assert taped == []
    model.eval()
    first, second = (linked(pic, chunks, query, LegoLink(12)) for _ in range(2))
    assert second.report.recompute_pass.startswith("captured")
    assert torch.equal(first.logits, second.logits)


class Doubled(nn.Module):
    """An activation without weights."""

    def forward(self, x):
        return 2 * nn.functional.silu(x)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_module_put_in_place_of_one_without_weights_is_noticed(hooked, taped, eagerly):
    model = tiny_model("llama")
    pic, chunks, query = pic_and_parts(model)
    linked(pic, chunks, query)
    before = linked(pic, chunks, query).logits.clone()
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.SiLU().eval() if hooked else Doubled().eval()
        if hooked:
            layer.mlp.act_fn.register_forward_hook(lambda module, given, made: 2 * made)
    prompt = linked(pic, chunks, query)
    assert (prompt.logits - before).abs().max() > 0.1
    assert_same(prompt, pic.link(chunks, query, METHOD))
    assert prompt.report.recompute_pass.startswith("eager" if hooked else "captured")


def test_weights_whose_hash_was_interrupted_do_not_count_as_seen(taped, monkeypatch):
    model = tiny_model("llama")
    pic, chunks, query = pic_and_parts(model)
    for _ in range(2):
        linked(pic, chunks, query)
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                module._parameters[name] = nn.Parameter(1.01 * weight.detach())
    gc.collect()

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hf_model, "fingerprint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            linked(pic, chunks, query)
    assert not pic.hf.in_place
    taped.clear()
    with pytest.raises(PICacheError, match="compiled with another model"):
        linked(pic, chunks, query)
    assert taped == []


@pytest.mark.parametrize(
    "method",
    [LegoLink(12), ProphetKV(0.3), OracleDeviation(0.2), NaiveReuse(force_query=False)],
    ids=str,
)
def test_the_reason_is_said_where_the_model_would_run_eagerly(method, taped):
    model = tiny_model("llama")
    pic, chunks, query = pic_and_parts(model)
    linked(pic, chunks, query)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(PICacheError, match=r"training mode.*call model.eval\(\) first"):
        linked(pic, chunks, query, method)
    model.eval()
    assert linked(pic, chunks, query, method).logits.isfinite().all()


def test_a_store_that_is_cleared_meanwhile_gets_no_chunk_of_other_weights(taped, monkeypatch):
    model = tiny_model("llama")
    pic, chunks, query = pic_and_parts(model)
    for _ in range(2):
        linked(pic, chunks, query)
    on_device = ChunkStore.on_device

    def then_cleared(store, keys):
        found = on_device(store, keys)
        for key in keys:
            store._memory.tiers[0].drop(key)
        return found

    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    monkeypatch.setattr(ChunkStore, "on_device", then_cleared)
    with pytest.raises(PICacheError, match="compiled with another model"):
        linked(pic, chunks, query)
    assert len(pic.store) == 0


def test_a_link_that_is_refused_leaves_the_arena_free(taped, monkeypatch):
    model = tiny_model("llama")
    pic, chunks, query = pic_and_parts(model)
    for _ in range(2):
        linked(pic, chunks, query)
    model.train()
    with pytest.raises(PICacheError, match="training mode") as kept:
        linked(pic, chunks, query)
    assert kept.traceback  # holds the frames of the link
    assert pic.passes.arena._tenant is None or pic.passes.arena._tenant() is None


def test_memory_that_lacks_for_the_first_replay_leaves_the_eager_pass(taped, monkeypatch, eagerly):
    def full(self, due):
        raise torch.OutOfMemoryError("CUDA out of memory")

    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    expected = eagerly(pic, chunks, query, METHOD)
    with monkeypatch.context() as patch:
        patch.setattr(recorders.Proven, "__call__", full)
        prompt = linked(pic, chunks, query)
    assert prompt.report.recompute_pass == "eager: there is not the memory to capture it"
    assert_same(prompt, expected)
    assert linked(pic, chunks, query).report.recompute_pass.startswith("captured")


def test_a_copy_that_saw_other_settings_leaves_no_key_of_them_behind():
    """The settings of a model are measured by whoever comes first, for all copies of a PIC."""
    model = tiny_model("gemma3")
    documents, _ = prompt_parts()
    pic = PIC(model, flops_per_byte=None)
    copy = pic.behind("keep")
    scale = model.config.query_pre_attn_scalar

    def rescaled(value):
        model.config.query_pre_attn_scalar = value
        for layer in model.model.layers:
            layer.self_attn.scaling = value**-0.5

    rescaled(4)
    copy.compile(documents[1])
    rescaled(scale)
    before = pic.compile(documents[2])
    rescaled(4)
    other = PIC(model, store=pic.store, flops_per_byte=None)
    assert other.compile(documents[2]).key != before.key
