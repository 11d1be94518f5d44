"""What stands around a forward: dtype, autocast, training, weights elsewhere, other threads."""

import threading
import warnings

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from sparsity import H2O, RKV, RaaS, SparseCache, SparsityError, StreamingLLM, record
from sparsity.retention.attention import attention_weights
from tests.helpers import assert_close, random_ids
from tests.sparsity.test_same_text import assert_unchanged, state
from tests.sparsity.zoo import AMPLE, shallow_model

PROMPT = random_ids(12, 1)


def generate(model, ids, cache, tokens=12):
    given = {"max_new_tokens": tokens, "do_sample": False}
    return model.generate(ids, past_key_values=cache, **given)


def fed(model, cache):
    """Logits of a prompt and of twelve tokens after it, one at a time."""
    with torch.no_grad():
        parts = PROMPT, *random_ids(12, 1, seed=4).split(1, dim=1)
        return torch.cat([model(input_ids=ids, past_key_values=cache).logits for ids in parts], 1)


def lower(model, way):
    """Another dtype from here on: the model converted, or autocast around its forwards."""
    if way == "converted":
        model.bfloat16()
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast")


CAUSES = {
    "converted": r"holds torch\.float32.*brings torch\.bfloat16: the model was converted",
    "autocast": r"torch\.autocast is on, to torch\.bfloat16 now and was off",
}


@pytest.mark.parametrize("way", CAUSES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_another_dtype_in_a_later_forward_is_refused(tokens, family, way):
    """With nothing written, in whatever layer the model has first, and no row repeated."""
    model = shallow_model(family)
    for policy in (RaaS(64), H2O(8)):
        cache = SparseCache(model.float(), policy)
        with torch.no_grad():
            model(input_ids=PROMPT, past_key_values=cache)
        before = state(cache)
        for rows in (1, 2):
            new = random_ids(tokens, rows, seed=4)
            with (
                lower(model, way),
                torch.no_grad(),
                pytest.raises(SparsityError, match=CAUSES[way]),
            ):
                model(input_ids=new, past_key_values=cache)
            assert_unchanged(cache, before)
        model.float()
        if way == "autocast":  # what it was before goes on as if nothing had been asked
            with torch.no_grad():
                model(input_ids=new[:1], past_key_values=cache)
            assert cache.get_seq_length() == 12 + tokens


def test_another_dtype_than_that_of_a_past_is_refused():
    model, past = shallow_model("llama"), DynamicCache()
    with torch.no_grad():
        model(input_ids=PROMPT[:, :11], past_key_values=past)
    cache = SparseCache(model.bfloat16(), RaaS(64), past=past)
    with pytest.raises(SparsityError, match=r"holds torch.float32.*brings torch.bfloat16"):
        generate(model, PROMPT, cache)
    assert cache.get_seq_length() == 11
    assert generate(model.float(), PROMPT, cache).shape == (1, 24)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])  # one dtype, and norms in float32
def test_a_whole_run_under_autocast_is_the_dense_one(family):
    model = shallow_model(family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = fed(model, DynamicCache(config=model.config))
        for policy in AMPLE:
            cache = SparseCache(model, policy)
            assert_close(str(policy), fed(model, cache), expected, 2e-2)
            assert {cache.layers[1].keys.dtype, cache.layers[1].values.dtype} == {torch.bfloat16}


def test_a_policy_computes_in_float32_under_autocast(shallow, monkeypatch):
    seen = []
    observe = H2O.observe

    def look(self, query, pages, scaling):
        seen.append((query, pages, scaling))
        return observe(self, query, pages, scaling)

    monkeypatch.setattr(H2O, "observe", look)
    cache = SparseCache(shallow, H2O(64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(shallow, PROMPT, cache)
    for query, pages, scaling in seen[4:]:  # single tokens; keys are changed in place
        keys, allowed = pages.keys[:, :, : pages.filled.shape[-1]], pages.filled[:, :, None]
        weights = attention_weights(query[:, :, None], keys, allowed, scaling)
        now = int(pages.now)
        expected = weights.mean(2)[..., 0, : now + 1]
        assert_close(f"token {now}", pages.weights[..., : now + 1], expected, 1e-6)


@pytest.mark.parametrize("policy", AMPLE, ids=str)
def test_float64_models(policy):
    model = shallow_model("llama").double()
    cache = SparseCache(model, policy)
    out = generate(model, PROMPT, cache, 20)
    assert torch.equal(out, generate(model, PROMPT, None, 20))
    assert cache.layers[0].keys.dtype == torch.float64


def test_training_mode_without_dropout_works():
    model = shallow_model("llama")
    expected = generate(model, PROMPT, None)
    model.train()
    assert torch.equal(generate(model, PROMPT, SparseCache(model, RaaS(64))), expected)


def test_dropout_is_refused_by_its_name():
    model = shallow_model("llama")
    model.config.attention_dropout = 0.1
    cache = SparseCache(model, RaaS(64))
    expected = generate(model, PROMPT, cache)
    cache.reset()
    model.train()
    with pytest.raises(SparsityError, match=r"training mode.*attention_dropout=0\.1.*model\.eval"):
        generate(model, PROMPT, cache)
    model.config.attention_dropout = 0.0
    model.model.layers[1].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.2))
    with pytest.raises(SparsityError, match=r"layers\.1\.mlp\.act_fn\.1 \(p=0\.2\).*model\.eval"):
        generate(model, PROMPT, cache)
    model.model.layers[0].self_attn.attention_dropout = 0.3
    model.eval()
    model.model.layers[0].self_attn.train()  # of one module alone the attention itself tells
    with pytest.raises(SparsityError, match=r"LlamaAttention drops 0\.3 of its attention"):
        generate(model, PROMPT, cache)
    cache.reset()
    model.eval()
    assert torch.equal(generate(model, PROMPT, cache), expected)


def test_gradient_checkpointing_is_refused_by_its_name():
    model = shallow_model("llama")
    cache = SparseCache(model, RaaS(64))
    model.gradient_checkpointing_enable()
    model.train()
    for make in (lambda: cache, lambda: SparseCache(model, StreamingLLM(8))):
        with pytest.raises(SparsityError, match=r"gradient checkpointing is on.*model\.eval\(\)"):
            generate(model, PROMPT, make())
    assert model.config._attn_implementation == "kv_retention"  # not to blame, not detached
    model.eval()  # where transformers does not checkpoint
    model.get_decoder().layers[1].train()  # a part alone: seen where it leaves out the cache
    part = r"gradient checkpointing is on and LlamaModel\.layers\.1 is in training mode"
    with pytest.raises(SparsityError, match=part):
        generate(model, PROMPT, SparseCache(model, RaaS(64)))
    assert model.config._attn_implementation == "kv_retention"
    model.eval()
    assert torch.equal(generate(model, PROMPT, cache), generate(model, PROMPT, None))


@pytest.mark.parametrize("policy", [RaaS(64), StreamingLLM(8)], ids=str)
def test_weights_that_are_not_here(policy):
    model = shallow_model("llama").to("meta")
    for ids in (PROMPT, PROMPT.to("meta")):
        with pytest.raises(SparsityError, match=r"weights of this model are on the device 'meta'"):
            model(input_ids=ids, past_key_values=SparseCache(model, policy))


@pytest.mark.parametrize("buffers", [False, True])
def test_weights_offloaded_to_host_memory(buffers):
    accelerate = pytest.importorskip("accelerate")
    model, placed = shallow_model("gemma3"), shallow_model("gemma3")
    accelerate.cpu_offload(placed, torch.device("cpu"), offload_buffers=buffers)
    assert placed.model.layers[0].mlp.up_proj.weight.is_meta
    for policy in (RaaS(16, page_size=4), StreamingLLM(8)):
        expected = generate(model, PROMPT, SparseCache(model, policy))
        assert torch.equal(generate(placed, PROMPT, SparseCache(placed, policy)), expected)


class Int8(nn.Module):
    """Weights in int8 and, if asked, each token's activations, as quantised models have them."""

    def __init__(self, linear, activations):
        super().__init__()
        self.scale = linear.weight.data.abs().amax(1, keepdim=True) / 127
        self.weight8 = (linear.weight.data / self.scale).round().to(torch.int8)
        self.activations = activations

    def forward(self, x):
        if self.activations:
            scale = x.abs().amax(-1, keepdim=True) / 127
            x = (x / scale).round() * scale
        return x @ (self.weight8.to(x.dtype) * self.scale).T


def quantise(module, activations):
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8(child, activations))
        else:
            quantise(child, activations)
    return module


@pytest.mark.parametrize("kind", ["weights", "activations too", "torch's dynamic"])
def test_quantised_models_work(kind):
    model = shallow_model("llama")
    if kind == "torch's dynamic":
        with warnings.catch_warnings(action="ignore"):
            model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    else:
        quantise(model, kind == "activations too")
    for policy in (RaaS(64), StreamingLLM(64), H2O(64), RKV(64, evict_every=8)):
        cache = SparseCache(model, policy)
        assert torch.equal(generate(model, PROMPT, cache), generate(model, PROMPT, None)), policy
    assert generate(model, PROMPT, SparseCache(model, StreamingLLM(8))).shape == (1, 24)


def test_one_cache_in_two_forwards_at_once_is_refused(shallow):
    """The forward that had begun goes on as if nothing had been asked; other caches do, too."""
    cache, spare = SparseCache(shallow, RaaS(64)), SparseCache(shallow, RaaS(64))
    inside, asked, said = threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert asked.wait(60)

    handle = shallow.model.layers[1].register_forward_pre_hook(wait)
    outs = []
    first = threading.Thread(target=lambda: outs.append(generate(shallow, PROMPT, cache, 1)))
    first.start()
    try:
        assert inside.wait(60)
        expected = generate(shallow, PROMPT, spare)
        for _ in range(2):
            with pytest.raises(SparsityError, match="another thread is in a forward with this"):
                shallow(input_ids=PROMPT, past_key_values=cache)
            said.append(cache.get_seq_length())
    finally:
        asked.set()
        first.join()
        handle.remove()
    assert torch.equal(outs[0], expected[:, :13])
    assert torch.equal(generate(shallow, outs[0], cache, 11), expected)


def test_a_forward_that_failed_in_another_thread_says_so(shallow):
    cache = SparseCache(shallow, RaaS(64))

    def fail(*_):
        raise RuntimeError("out of memory")

    def try_it():
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(shallow, PROMPT, cache)

    handle = shallow.model.layers[1].register_forward_pre_hook(fail)
    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    handle.remove()
    with pytest.raises(SparsityError, match=r"did not finish.*cache\.reset"):
        generate(shallow, PROMPT, cache)
    cache.reset()
    assert torch.equal(generate(shallow, PROMPT, cache), generate(shallow, PROMPT, None))


def test_recording_under_autocast():
    model = shallow_model("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trace = record(model, input_ids=PROMPT, max_new_tokens=8, do_sample=False)
        dense = generate(model, PROMPT, None, 8)
    assert torch.equal(trace.ids, dense[0])
    assert {layer.queries.dtype for layer in trace.layers.values()} == {torch.bfloat16}
