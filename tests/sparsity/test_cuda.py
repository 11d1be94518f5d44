"""On a CUDA device: the same tokens as dense attention and as on the CPU."""

import copy

import pytest
import torch
from transformers import DynamicCache

from sparsity import Quest, RaaS, Random, StreamingLLM
from sparsity import SparseCache as AnyCache
from tests.helpers import FAMILIES, random_ids, tiny_model
from tests.sparsity.helpers import padded_inputs
from tests.sparsity.zoo import AMPLE, TIGHT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def SparseCache(model, policy, **kwargs):  # noqa: N802 (in place of the class)
    """A cache that grows; what is compiled is in test_cuda_compiled."""
    return AnyCache(model, policy, static=False, **kwargs)


def generate(model, cache, tokens=40, prompt=21):
    inputs = {name: t.to(model.device) for name, t in padded_inputs(prompt, 6, 0, 0).items()}
    inputs |= {"past_key_values": cache, "max_new_tokens": tokens, "do_sample": False}
    return model.generate(**inputs).cpu()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ample_budget_equals_dense(family):
    model = tiny_model(family).to("cuda")
    dense = generate(model, None)
    for policy in (Random(64), StreamingLLM(64), Quest(64, dense_layers=0), RaaS(64)):
        assert torch.equal(generate(model, SparseCache(model, policy)), dense), policy


@pytest.mark.parametrize("policy", AMPLE, ids=str)
def test_every_policy_with_room_equals_dense(policy):
    model = tiny_model("llama").to("cuda")
    expected = generate(model, None, tokens=20)
    assert torch.equal(generate(model, SparseCache(model, policy), tokens=20), expected)


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_a_tight_budget_keeps_what_it_keeps_on_the_cpu(policy):
    """Slots of the first layer, whose scores are the same up to rounding; then as many of each."""
    model, kept = tiny_model("llama"), []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(model).to(device)
        cache = SparseCache(there, policy)
        generate(there, cache, tokens=16, prompt=13)
        kept.append([r.pool.slots.cpu() for r in cache.retentions.values()])
        report = cache.report()
        assert report.num_bytes <= report.peak_bytes
    assert torch.equal(kept[0][0], kept[1][0])
    for here, there in zip(*kept, strict=True):
        assert torch.equal((here >= 0).sum(-1), (there >= 0).sum(-1))


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_a_parked_cache_leaves_the_device_and_comes_back(policy):
    model, ids = tiny_model("gemma3").to("cuda"), random_ids(13, 2).to("cuda")

    def go_on(cache, ids):
        return model.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache)

    cache = SparseCache(model, policy)
    ids = go_on(cache, ids)
    parked = copy.deepcopy(cache)
    for i in range(len(parked.layers)):
        parked.offload(i, only_non_sliding=False)
    for retention in parked.retentions.values():
        assert {t.device.type for t in retention.pool.tensors().values()} == {"cpu"}
    assert {layer.keys.device.type for layer in parked.layers} == {"cpu"}
    assert torch.equal(go_on(parked, ids), go_on(cache, ids))
    assert {layer.keys.device.type for layer in parked.layers} == {"cuda"}


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_going_on_from_an_offloading_cache(policy):
    model, ids = tiny_model("gemma3").to("cuda"), random_ids(19, 2).to("cuda")
    pasts = [DynamicCache(config=model.config, offloading=given) for given in (True, False)]
    tokens = []
    for past in pasts:
        with torch.no_grad():
            model(input_ids=ids[:, :18], past_key_values=past)
        cache = SparseCache(model, policy, past=past)
        tokens.append(model.generate(ids, max_new_tokens=12, past_key_values=cache))
    assert pasts[0].layers[1].keys.device.type == "cpu"
    assert torch.equal(*tokens)
