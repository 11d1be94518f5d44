"""What is a plain prefill runs on the attention that the model was loaded with."""

import sys

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, integrations, masking_utils

from picache import PIC, FullRecompute, LegoLink
from tests import flash_kernels
from tests.helpers import assert_close, random_ids, tiny_model
from tests.picache.helpers import compiled, prefill, prompt_parts

LENGTHS, QUERY = (7, 20, 13), 5


def count(monkeypatch, model, implementation, called):
    """Have `called` told the queries and keys of every call of the implementation's function."""
    if implementation == "eager":
        written = sys.modules[type(model).__module__]
        function = written.eager_attention_forward
    else:
        function = AttentionInterface._global_mapping[implementation]

    def spy(module, query, key, *args, **kwargs):
        called(query.shape[2], key.shape[2])
        return function(module, query, key, *args, **kwargs)

    if implementation == "eager":
        monkeypatch.setattr(written, "eager_attention_forward", spy)
    else:
        monkeypatch.setitem(AttentionInterface._global_mapping, implementation, spy)


@torch.no_grad()
def last(model, ids):
    """The model's own logits of the last token of ids ``[tokens]``, as picache asks for them."""
    return model(ids[None], use_cache=True, logits_to_keep=1).logits[:, -1]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_chunks_and_full_prefills_are_bit_for_bit_the_models_own(
    family, implementation, monkeypatch
):
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    pic, calls = PIC(model), []
    documents, query = prompt_parts(LENGTHS, QUERY)
    ids = torch.cat([*documents, query])
    first, whole = last(model, documents[0]), last(model, ids)
    count(monkeypatch, model, implementation, lambda *shape: calls.append(shape))
    compiled(pic, documents)
    assert calls == [(n, n) for n in LENGTHS for _ in range(4)]
    assert torch.equal(pic.hf.full_prefill(documents[0])[0], first)
    calls.clear()
    assert torch.equal(pic.hf.full_prefill(ids)[0], whole)
    assert calls == [(len(ids), len(ids))] * 4


@pytest.mark.parametrize("implementation", flash_kernels.VERSIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_flash_attention_computes_all_but_scattered_tokens(family, implementation, monkeypatch):
    kernels = flash_kernels.install(monkeypatch)
    model = tiny_model(family, dtype=torch.bfloat16)
    flash_kernels.load(model, implementation)
    pic = PIC(model, flops_per_byte=None)
    documents, query = prompt_parts(LENGTHS, QUERY)
    ids = torch.cat([*documents, query])

    def shapes():
        assert all(name == "batch" and given["causal"] for name, given in kernels.calls)
        return [(given["q"].shape[1], given["k"].shape[1]) for _, given in kernels.calls]

    kernels.calls.clear()
    chunks = compiled(pic, documents)
    assert shapes() == [(n, n) for n in LENGTHS for _ in range(4)]
    kernels.calls.clear()
    expected, _ = pic.hf.full_prefill(ids)
    assert shapes() == [(len(ids), len(ids))] * 4
    kernels.calls.clear()
    everything = pic.link(chunks, query, FullRecompute())
    assert shapes() == [(len(ids) - LENGTHS[0], len(ids))] * 4
    assert_close("all recomputed", everything.logits, expected, 3e-2)
    kernels.calls.clear()
    pic.link(chunks, query, LegoLink(2))  # queries anywhere: by position, so ours
    assert shapes() == []


@pytest.mark.filterwarnings("ignore:flex_attention call", "ignore:_compile flag")
@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.compiled)])
def test_flex_attention_computes_them_and_is_compiled(family, monkeypatch):
    """Not compiled it would hold the scores of all queries and keys, which is not to be seen."""
    # Of a layer of each kind: every call of the attention compiles something.
    options = {} if family == "llama" else {"layer_types": ["sliding_attention", "full_attention"]}
    model, seen, graphs = tiny_model(family, num_hidden_layers=2, **options), [], []
    model.set_attn_implementation("flex_attention")

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def called(queries, keys):
        seen.append((queries, keys))
        torch._dynamo.reset()
        before = len(graphs)
        torch.compile(torch.add, backend=backend)(torch.ones(2), 1)
        compiles.append(len(graphs) > before)

    compiles: list[bool] = []
    uncompiled = integrations.flex_attention.flex_attention
    monkeypatch.setattr(
        integrations.flex_attention, "compile_friendly_flex_attention",
        lambda *args, training, **kwargs: uncompiled(*args, **kwargs),
    )  # fmt: skip
    monkeypatch.setattr(masking_utils, "create_block_mask", uncompiled_block_mask)
    pic = PIC(model, flops_per_byte=None)
    documents, query = prompt_parts(LENGTHS, QUERY)
    ids = torch.cat([*documents, query])
    count(monkeypatch, model, "flex_attention", called)
    chunks = compiled(pic, documents)
    expected, _ = pic.hf.full_prefill(ids)
    everything = pic.link(chunks, query, FullRecompute())
    assert_close("all recomputed", everything.logits, expected)
    n = len(ids)
    shapes = [(m, m) for m in (*LENGTHS, n)] + [(n - LENGTHS[0], n)]
    assert seen == [shape for shape in shapes for _ in range(2)]
    assert all(compiles)
    seen.clear()
    pic.link(chunks, query, LegoLink(2))
    assert seen == []


def uncompiled_block_mask(*args, _compile, **kwargs):
    return create_block_mask(*args, **kwargs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", *flash_kernels.VERSIONS])
def test_on_a_gpu(implementation):
    shape = dict(hidden_size=256, head_dim=64, num_hidden_layers=2)
    model = tiny_model("qwen3", torch.bfloat16, **shape).to("cuda")
    documents = [random_ids(n, seed=n) for n in (130, 211, 77)]
    query = random_ids(9)
    ids = torch.cat([*documents, query])
    plain, _ = prefill(model, ids)
    try:
        model.set_attn_implementation(implementation)
    except ImportError as error:
        pytest.skip(f"needs the package of {implementation} ({error})")
    pic = PIC(model, flops_per_byte=None)
    expected, _ = pic.hf.full_prefill(ids)
    assert torch.equal(expected, last(model, ids.to("cuda")))
    assert_close("against sdpa", expected, plain, 3e-2)
    everything = pic.link(compiled(pic, documents), query, FullRecompute())
    assert_close("all recomputed", everything.logits, expected, 3e-2)
