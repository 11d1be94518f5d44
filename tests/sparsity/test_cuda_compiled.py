"""On a CUDA device: one compiled step, captured once, with the tokens of memory that grows."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from sparsity import H2O, Full, Quest, RaaS, SnapKV, SparseCache, StreamingLLM
from sparsity.hf.decoding_path import COMPILED
from tests.helpers import SHAPE, tiny_model
from tests.sparsity.helpers import padded_inputs
from tests.sparsity.zoo import TIGHT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def build(dtype=torch.float32):
    return tiny_model("llama", dtype, num_hidden_layers=2, head_dim=64).to("cuda")


def bytes_held(model, policy):
    """Of a short text."""
    cache = SparseCache(model, policy)
    generate(model, cache, 2)
    return cache.report().num_bytes


def generate(model, cache, tokens, prompt=13, **kwargs):
    given = {name: t.to("cuda") for name, t in padded_inputs(prompt, 5, 0).items()} | kwargs
    return model.generate(
        past_key_values=cache, max_new_tokens=tokens, do_sample=False, eos_token_id=None, **given
    )


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_the_tokens_of_memory_that_grows(policy):
    model = build()
    expected = generate(model, SparseCache(model, policy, static=False), 200)
    cache = SparseCache(model, policy, max_tokens=256)
    assert torch.equal(generate(model, cache, 200), expected)
    assert cache.report().decoding == COMPILED
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_nothing_is_compiled_again_in_4096_steps_nor_for_another_cache():
    model = build(torch.bfloat16)
    policy = RaaS(128, pin_prompt=False)
    for _ in range(2):
        cache = SparseCache(model, policy)
        generate(model, cache, 4097)
        assert cache.report().tokens_seen == 13 + 4096
        assert cache.report().decoding == COMPILED
    assert counters["stats"]["unique_graphs"] == 1
    assert cache.report().num_bytes == bytes_held(model, policy)


def test_the_next_caches_are_served_by_the_same_recording():
    """Wherever the allocator would have put them; torch gives up after 128 recordings."""
    from torch._inductor.cudagraph_trees import get_manager  # takes seconds to import

    model, elsewhere = build(torch.bfloat16), []
    cache = SparseCache(model, RaaS(128, pin_prompt=False))
    generate(model, cache, 16)
    recorded = get_manager(0).new_graph_id().id
    for turn in range(135):
        cache = SparseCache(model, RaaS(128, pin_prompt=False))
        generate(model, cache, 4, prompt=13 + turn % 7)
        elsewhere.append(torch.empty(1000 * turn, device="cuda"))
    assert get_manager(0).new_graph_id().id == recorded + 1
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize(
    "policy",
    [
        RaaS(128),
        Quest(64),
        H2O(64),
        StreamingLLM(64),
        SnapKV(64, window=16, evict_every=32),
        Full(),
    ],
    ids=str,
)
def test_logits_in_bfloat16(policy):
    """Of 64 steps on the same tokens, since rounding may choose another one by itself."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": 2, "head_dim": 64})
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    text = torch.randint(3, config.vocab_size, (2, 64), device="cuda")

    def forced(ids, scores):
        chosen = text[:, ids.shape[1] - 96, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    logits = []
    for static in (False, None):
        cache = SparseCache(model, policy, max_tokens=256, static=static)
        more = {"output_logits": True, "return_dict_in_generate": True}
        out = generate(model, cache, 64, 96, logits_processor=[forced], **more)
        assert torch.equal(out.sequences[:, 96:], text)
        logits.append(torch.stack(out.logits, 1).float())
    eager, compiled = logits
    assert (compiled - eager).norm() / eager.norm() < 1e-2
