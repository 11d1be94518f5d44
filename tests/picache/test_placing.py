"""A prompt put together in all layers at once is the one put together layer by layer."""

import pytest
import torch

from picache import PIC, DummySinks, LegoLink, NaiveReuse
from picache.kernels import placing
from picache.linking import link, linked_kv
from tests.helpers import tiny_model


@pytest.fixture
def layer_by_layer(monkeypatch):
    def do():
        monkeypatch.setattr(link, "can_place", lambda memory: False)

    return do


def kv_of(prompt):
    return [(layer.keys.clone(), layer.values.clone()) for layer in prompt.past_key_values.layers]


def same(a, b):
    for one, other in zip(a, b, strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_chunks_behind_sinks_in_a_batch(captured, layer_by_layer):
    """Layers rotate in two ways; which families do so at all is with the captured pass."""
    pic = PIC(
        tiny_model("gemma3", torch.float32), sinks=DummySinks(2, token=7), flops_per_byte=None
    )
    chunks = [pic.compile(list(range(5 + n, 17 + 3 * n))) for n in range(4)]
    prompts = []
    for turn in range(2):
        if turn:
            layer_by_layer()
        prompt = pic.link([chunks, chunks[:2]], [[3, 4, 5], [6]], NaiveReuse())
        assert prompt.report.recompute_pass.startswith("captured")
        prompts.append((kv_of(prompt), prompt.logits.clone(), prompt.report.bytes_loaded))
    same(prompts[0][0], prompts[1][0])
    torch.testing.assert_close(prompts[0][1], prompts[1][1], rtol=1e-5, atol=1e-5)
    assert prompts[0][2] == prompts[1][2]


def test_one_launch_for_layers_that_are_alike(captured, monkeypatch):
    model, counts = tiny_model("llama", torch.float32), []

    def counted(layers, parts, pieces):
        counts.append((len({layer.kind for layer in layers}), len(pieces)))
        return place_layers(layers, parts, pieces)

    place_layers = placing.place_layers
    monkeypatch.setattr(linked_kv, "place_layers", counted)
    pic = PIC(model, flops_per_byte=None)
    chunks = [pic.compile(list(range(5 + n, 17 + 3 * n))) for n in range(3)]
    pic.link(chunks, [3, 4, 5], LegoLink(2))
    pic.link([chunks, chunks[:2]], [[3, 4, 5], [6]], LegoLink(2))
    assert counts == [(1, 3), (1, 5)]  # all rows of a batch in one


def test_the_exact_prefix_is_copied_bit_for_bit(captured):
    model = tiny_model("llama", torch.bfloat16)
    pic = PIC(model, flops_per_byte=None)
    chunks = [pic.compile(list(range(5 + n, 30 + n))) for n in range(3)]
    prefix = model.get_decoder()(torch.arange(5, 30)[None]).past_key_values
    prompt = pic.link(chunks, [3, 4, 5], LegoLink(2))
    for layer, (keys, values) in enumerate(kv_of(prompt)):
        assert torch.equal(keys[:, :, :25], prefix.layers[layer].keys)
        assert torch.equal(values[:, :, :25], prefix.layers[layer].values)


def test_memory_that_kernels_do_not_take_is_filled_layer_by_layer():
    tensor = torch.zeros(1, 2, 8, 16)
    assert placing.can_place([(tensor, tensor)])
    assert not placing.can_place([(tensor, tensor.double())])
    assert not placing.can_place([(tensor, tensor[..., 1:])])
    assert not placing.can_place([(tensor.mT, tensor)])
