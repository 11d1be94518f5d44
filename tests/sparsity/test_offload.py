"""Caches parked in host memory, and models whose weights come and go with hooks."""

import copy
from collections.abc import Mapping
from importlib.util import find_spec

import pytest
import torch

from sparsity import SparseCache
from sparsity.retention.layer import LayerRetention
from tests.helpers import random_ids
from tests.sparsity.zoo import TIGHT, shallow_model


def generate(model, cache, ids):
    return model.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache)


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_a_parked_cache_comes_back_by_itself(policy, monkeypatch):
    """There is one device here, so every move turns a tensor's signs: two moves turn them back."""
    model = shallow_model("gemma3")
    expected = SparseCache(model, policy)
    ids = generate(model, expected, random_ids(13, 2))
    after = generate(model, expected, ids)
    cache = SparseCache(model, policy)
    generate(model, cache, random_ids(13, 2))
    move = LayerRetention.map

    def turn(t):
        return ~t if t.dtype == torch.bool else -t

    monkeypatch.setattr(LayerRetention, "map", lambda self, to: move(self, lambda t: turn(to(t))))
    fork = copy.deepcopy(cache)
    for parked in (cache, fork):
        for i in range(len(cache.layers)):
            parked.offload(i, only_non_sliding=False)
            parked.offload(i)  # once is enough
        assert parked.layers[1].keys is parked.retentions[1].held[0]
    for i in range(len(cache.layers)):
        fork.prefetch(i)
        fork.prefetch(i)
    for parked in (cache, fork):
        assert torch.equal(generate(model, parked, ids), after)


def test_transformers_own_offloaded_cache_is_one_or_the_other(llama):
    with pytest.raises(ValueError, match="use only one of the two"):
        llama.generate(
            random_ids(9, 1),
            past_key_values=SparseCache(llama, TIGHT[3]),
            cache_implementation="offloaded",
            max_new_tokens=2,
        )


def place_by_hand(model):
    """Weights are there only while their module runs; arguments are rebuilt and moved."""

    def move(x):
        if isinstance(x, tuple | list):
            return type(x)(move(y) for y in x)
        if isinstance(x, Mapping):
            return type(x)({k: y if k == "past_key_values" else move(y) for k, y in x.items()})
        return x.to("cpu") if hasattr(x, "to") else x

    def place(module):
        own = {name: p.data for name, p in module.named_parameters(recurse=False)}

        def load(module, args, kwargs):
            for name, data in own.items():
                module._parameters[name] = torch.nn.Parameter(data)
            return move(args), move(kwargs)

        def drop(module, args, out):
            for name, data in own.items():
                module._parameters[name] = torch.nn.Parameter(data.to("meta"))

        module.register_forward_pre_hook(load, with_kwargs=True)
        module.register_forward_hook(drop)
        drop(module, (), None)

    for module in model.modules():
        if module is not model:
            place(module)


@pytest.mark.parametrize("way", ["by hand", "accelerate"])
def test_a_model_placed_by_hooks(way, tmp_path):
    if way == "accelerate" and find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed: pip install accelerate")
    model, placed = shallow_model("gemma3"), shallow_model("gemma3")
    if way == "by hand":
        place_by_hand(placed)
    else:
        import accelerate

        accelerate.disk_offload(placed, tmp_path, execution_device=torch.device("cpu"))
    assert placed.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    ids = random_ids(13, 2)
    for policy in TIGHT[::3]:  # of every kind: what is placed are the weights
        expected = generate(model, SparseCache(model, policy), ids)
        assert torch.equal(generate(placed, SparseCache(placed, policy), ids), expected), policy
