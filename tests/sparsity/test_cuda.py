"""On a CUDA device: the same tokens as dense attention and as on the CPU."""

import copy

import pytest
import torch

from sparsity import Quest, RaaS, Random, SparseCache, StreamingLLM
from tests.helpers import FAMILIES, random_ids, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def generate(model, cache, tokens=40):
    ids = random_ids(21, 3).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=tokens, do_sample=False
    ).cpu()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ample_budget_equals_dense(family):
    model = tiny_model(family).to("cuda")
    dense = generate(model, None)
    for policy in (Random(64), StreamingLLM(64), Quest(64, dense_layers=0), RaaS(64)):
        assert torch.equal(generate(model, SparseCache(model, policy)), dense), policy


@pytest.mark.parametrize(
    "policy",
    [
        Random(32),
        StreamingLLM(16),
        Quest(8, page_size=4, dense_layers=0),
        RaaS(32, page_size=4, alpha=0.15),
    ],
    ids=str,
)
def test_a_tight_budget_keeps_what_it_keeps_on_the_cpu(policy):
    model = tiny_model("llama")
    kept = []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(model).to(device)
        cache = SparseCache(there, policy)
        tokens = generate(there, cache)
        kept.append((tokens, [layer.retention.pool.slots.cpu() for layer in cache.layers]))
        report = cache.report()
        assert report.num_bytes <= report.peak_bytes
    assert torch.equal(kept[0][0], kept[1][0])
    for here, there in zip(kept[0][1], kept[1][1], strict=True):
        assert torch.equal(here, there)
