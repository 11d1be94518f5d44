"""A prompt is computed by the attention that the model was loaded with, and the report says so."""

import copy
import functools
import importlib.util
import sys
from contextlib import ExitStack

import pytest
import torch
import transformers
from transformers import AttentionInterface, DynamicCache

import sparsity
from sparsity import H2O, RaaS, SnapKV, SparseCache, SparsityError
from sparsity.hf import attach, own_attention
from tests import flash_kernels
from tests.helpers import SHAPE, assert_close, random_ids, tiny_model
from tests.sparsity.helpers import padded_inputs
from tests.sparsity.zoo import SCORES, shallow_model

OURS = [
    "eager", "sdpa",
    pytest.param("flex_attention", marks=pytest.mark.filterwarnings("ignore:flex_attention call")),
]  # fmt: skip
POLICIES = [RaaS(8, page_size=4, pin_prompt=False), H2O(8), SnapKV(8, window=4)]
KERNELS = {
    "flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_compilation():
    """flex_attention is compiled for minutes on a CPU, and computes the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


def loaded(family, implementation, **changes):
    model = tiny_model(family, **changes)
    model.set_attn_implementation(implementation)
    return model


def spied(monkeypatch, model, implementation):
    """The layers that call the implementation's function, and with how many queries."""
    calls = []

    def spy(function):
        @functools.wraps(function)
        def called(module, query, key, *args, **kwargs):
            calls.append((module.layer_idx, query.shape[2]))
            return function(module, query, key, *args, **kwargs)

        return called

    if implementation == "eager":
        written = sys.modules[type(model).__module__]
        monkeypatch.setattr(
            written, "eager_attention_forward", spy(written.eager_attention_forward)
        )
    else:
        functions = AttentionInterface._global_mapping
        monkeypatch.setitem(functions, implementation, spy(functions[implementation]))
    return calls


@torch.no_grad()
def logits(model, cache, ids, **inputs):
    return model(input_ids=ids, past_key_values=cache, **inputs).logits


@pytest.mark.parametrize("implementation", OURS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_a_prompt_is_bit_for_bit_that_of_the_implementation(family, implementation, monkeypatch):
    model = loaded(family, implementation)
    layers = model.config.num_hidden_layers
    inputs = padded_inputs(23, 6, 0)
    for given in ({"input_ids": inputs["input_ids"]}, inputs):
        ids = given["input_ids"]
        mask = {name: t for name, t in given.items() if name != "input_ids"}
        expected = logits(model, DynamicCache(config=model.config), ids, **mask)
        with monkeypatch.context() as patch:
            calls = spied(patch, model, implementation)
            for policy in POLICIES:
                calls.clear()
                cache = SparseCache(model, policy)
                got = logits(model, cache, ids, **mask)
                assert torch.equal(got[1], expected[1]), policy
                assert torch.equal(got[0, -1], expected[0, -1]), policy
                assert calls == [(layer, 23) for layer in range(layers)]
                report = cache.report()
                assert report.prompt_attention == implementation
                assert f"attention by {implementation}" in str(report)
        sparsity.detach(model)


@pytest.mark.parametrize("implementation", OURS)
def test_what_is_held_after_it_is_what_ours_holds(implementation, monkeypatch):
    """Keys, values and the policy's choice follow from a prompt that another function computed."""
    model, inputs = loaded("gemma3", implementation), padded_inputs(23, 6, 0)
    model.generation_config.max_new_tokens = 6
    for policy in POLICIES:
        own, ours = SparseCache(model, policy), SparseCache(model, policy)
        tokens = model.generate(**inputs, past_key_values=own)
        with monkeypatch.context() as patch:
            patch.setattr(own_attention.OwnAttention, "refused", lambda *_: "tested")
            again = model.generate(**inputs, past_key_values=ours)
        assert ours.report().prompt_attention == "sparsity (tested)"
        assert torch.equal(tokens, again)
        for a, b in zip(own.retentions.values(), ours.retentions.values(), strict=True):
            assert torch.equal(a.pool.slots, b.pool.slots)
            assert_close("keys", a.pool.keys, b.pool.keys)


@pytest.mark.parametrize("implementation", OURS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_other_caches_are_bit_for_bit_as_without_us(family, implementation, monkeypatch):
    model, ids = loaded(family, implementation), random_ids(26, 2)
    model.requires_grad_(False)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0

    def chunks(cache):
        parts = [(0, 12), (12, 23), (23, 24), (24, 25), (25, 26)]
        return torch.cat(
            [logits(model, cache, ids[:, a:b], attention_mask=mask[:, :b]) for a, b in parts], 1
        )

    def every():
        return [
            chunks(DynamicCache(config=model.config)), chunks(DynamicCache()),
            model(input_ids=ids, use_cache=False).logits,
        ]  # fmt: skip

    expected = every()
    sparsity.attach(model)
    calls = spied(monkeypatch, model, implementation)
    got = every()
    assert len(calls) == 11 * model.config.num_hidden_layers
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_eager_still_gives_its_weights():
    model, ids = loaded("llama", "eager"), random_ids(9, 1)
    expected = model(input_ids=ids, output_attentions=True).attentions
    sparsity.attach(model)
    got = model(input_ids=ids, output_attentions=True).attentions
    assert len(got) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_what_needs_a_rule_of_ours_leaves_it():
    model, ids = loaded("llama", "sdpa"), random_ids(20, 2)
    cache = SparseCache(model, RaaS(64))
    assert cache.report().prompt_attention == ""
    model.generate(ids[:, :12], past_key_values=cache, max_new_tokens=2)
    assert cache.report().prompt_attention == "sdpa"
    logits(model, cache, ids[:, :4])
    assert cache.report().prompt_attention == "sparsity (tokens are held from before)"
    cache.reset()
    assert cache.report().prompt_attention == ""
    logits(model, cache, ids[:, :1])
    assert cache.report().prompt_attention == "sparsity (a prompt of one token)"
    past = DynamicCache()
    logits(model, past, ids[:, :12])
    cache = SparseCache(model, RaaS(64), past=past)
    logits(model, cache, ids[:, 12:])
    assert cache.report().prompt_attention == "sparsity (tokens are held from before)"


WHY = {
    ("Gemma2", "sdpa"): "sdpa computes no soft cap",
    ("GptOss", "sdpa"): "sdpa is not known to compute attention sinks",
    ("GptOss", "flex_attention"): "flex_attention is not known to compute attention sinks",
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("name", SCORES)
def test_scores_that_an_implementation_leaves_out_are_computed_all_the_same(name, implementation):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE | SCORES[name])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.eval()
    given = padded_inputs(21, 5, 0)
    ids = given.pop("input_ids")
    expected = logits(model, DynamicCache(config=model.config), ids, **given)
    flash_kernels.load(model, implementation)  # which transformers refuses, from some release on
    cache = SparseCache(model, RaaS(64))
    assert_close("logits", logits(model, cache, ids, **given)[:, -1], expected[:, -1])
    why = WHY.get((name, implementation))
    by = implementation if why is None else f"sparsity ({why})"
    assert cache.report().prompt_attention == by


@pytest.mark.parametrize("implementation", flash_kernels.VERSIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_flash_attention_gets_what_transformers_would_give_it(family, implementation, monkeypatch):
    kernels = flash_kernels.install(monkeypatch)
    model = tiny_model(family, dtype=torch.bfloat16)
    flash_kernels.load(model, implementation)
    for pads in ((0, 0), (6, 0)):
        given = padded_inputs(23, *pads)
        ids = given.pop("input_ids")
        kernels.calls.clear()
        expected = logits(model, DynamicCache(config=model.config), ids, **given)
        theirs = list(kernels.calls)
        kernels.calls.clear()
        cache = SparseCache(model, RaaS(64))
        got = logits(model, cache, ids, **given)
        assert cache.report().prompt_attention == implementation
        assert torch.equal(got, expected)
        assert len(kernels.calls) == 4
        for (name, mine), (their_name, their) in zip(kernels.calls, theirs, strict=True):
            assert name == their_name == ("texts" if any(pads) else "batch")
            assert mine["causal"]
            assert mine["q"].dtype == torch.bfloat16
            if any(pads):
                assert mine["lengths"] == [17, 23]
            else:
                assert mine["window"] == their["window"]
            assert torch.equal(mine["q"], their["q"])
        ours = tiny_model(family, dtype=torch.bfloat16)
        plain = logits(ours, DynamicCache(config=ours.config), ids, **given)
        assert_close("against sdpa", got[:, -1], plain[:, -1], 3e-2)
        for module in model.get_decoder().modules():
            own_attention._BEFORE.pop(module, None)
        model = tiny_model(family, dtype=torch.bfloat16)
        flash_kernels.load(model, implementation)


def test_positions_that_are_not_the_texts_do_not_split_it(monkeypatch):
    """Flash attention would take one row whose positions jump for several texts in a row."""
    kernels = flash_kernels.install(monkeypatch)
    model, ids = tiny_model("llama", dtype=torch.bfloat16), random_ids(12, 1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]])
    expected = logits(model, SparseCache(model, RaaS(64)), ids, position_ids=positions)
    sparsity.detach(model)
    flash_kernels.load(model, "flash_attention_3")
    got = logits(model, SparseCache(model, RaaS(64)), ids, position_ids=positions)
    assert [name for name, _ in kernels.calls] == ["batch"] * 4
    assert_close("logits", got, expected, 3e-2)


@pytest.mark.parametrize("implementation", flash_kernels.VERSIONS)
def test_flash_attention_is_not_asked_for_what_it_cannot(implementation, monkeypatch):
    kernels = flash_kernels.install(monkeypatch)
    model, ids = tiny_model("llama"), random_ids(12, 2)
    expected = logits(model, DynamicCache(), ids)
    flash_kernels.load(model, implementation)
    cache = SparseCache(model, RaaS(64))
    assert_close("logits", logits(model, cache, ids), expected)
    assert cache.report().prompt_attention == (
        f"sparsity ({implementation} computes in float16 and bfloat16, not in torch.float32)"
    )
    with torch.autocast("cpu", torch.bfloat16):
        cache = SparseCache(model, RaaS(64))
        logits(model, cache, ids)
    assert cache.report().prompt_attention == implementation
    assert {name for name, _ in kernels.calls} == {"batch"}


@pytest.mark.parametrize(
    ("implementation", "release", "caps"),
    [
        ("flash_attention_2", "2.5.9", False),
        ("flash_attention_2", "2.8.3", True),
        ("flash_attention_4", "2.5.9", True),
    ],
)
def test_flash_attention_caps_scores_from_a_release_on(implementation, release, caps, monkeypatch):
    flash_kernels.install(monkeypatch)
    own_attention._caps.cache_clear()
    monkeypatch.setattr(own_attention, "version", lambda _: release)
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SHAPE | SCORES["Gemma2"], dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model, ids = model.to(torch.bfloat16).eval(), random_ids(21, 2)
    expected = logits(model, DynamicCache(config=model.config), ids)
    flash_kernels.load(model, implementation)
    cache = SparseCache(model, RaaS(64))
    assert_close("logits", logits(model, cache, ids), expected, 3e-2)
    why = f"sparsity ({implementation} is not known to compute a soft cap)"
    assert cache.report().prompt_attention == (implementation if caps else why)
    own_attention._caps.cache_clear()


def test_an_argument_that_nobody_knows_leaves_it():
    model, ids = loaded("llama", "sdpa"), random_ids(12, 2)
    expected = logits(model, SparseCache(model, RaaS(64)), ids)
    cache = SparseCache(model, RaaS(64))
    assert_close("logits", logits(model, cache, ids, unheard_of=1.0), expected)
    why = "sparsity (the model hands over 'unheard_of')"
    assert cache.report().prompt_attention == why


def test_the_function_is_the_one_that_the_layers_file_names(monkeypatch):
    """Eager attention is found where the layer's own forward finds it, or not at all."""
    model, ids = loaded("llama", "eager"), random_ids(12, 2)
    expected = logits(model, DynamicCache(), ids)
    cache = SparseCache(model, RaaS(64))
    attention = type(model.model.layers[0].self_attn)

    def forward(self, *args, **kwargs):
        return before(self, *args, **kwargs)

    before = attention.forward
    with monkeypatch.context() as patch:
        patch.setattr(attention, "forward", forward)  # says nothing of an eager function
        assert_close("logits", logits(model, cache, ids), expected)
    assert cache.report().prompt_attention == "sparsity (the model's own is not known)"


def test_a_detached_model_and_a_copy_are_forgotten():
    model, ids = loaded("llama", "eager"), random_ids(12, 2)
    expected = logits(model, DynamicCache(), ids)
    sparsity.attach(model)
    assert all(module in own_attention._BEFORE for module in model.model.modules())
    assert_close("a copy", logits(copy.deepcopy(model), DynamicCache(), ids), expected)
    model.set_attn_implementation("sdpa")
    cache = SparseCache(model, RaaS(64))  # attaches anew
    logits(model, cache, ids)
    assert cache.report().prompt_attention == "sdpa"
    sparsity.detach(model)
    assert not any(module in own_attention._BEFORE for module in model.model.modules())
    assert model.config._attn_implementation == "sdpa"


def test_what_somebody_else_puts_there_for_a_while_is_never_taken_for_the_models_own(monkeypatch):
    """Another thread may end its link between two looks at the configuration: there is one."""
    model, reads = loaded("llama", "sdpa"), []

    def read(decoder):
        reads.append(decoder)
        return "somebody_elses" if len(reads) == 1 else decoder.config._attn_implementation

    monkeypatch.setitem(AttentionInterface._global_mapping, "somebody_elses", read)
    monkeypatch.setattr(attach, "_implementation", read)
    with pytest.raises(SparsityError, match="'somebody_elses'"):
        sparsity.attach(model)
    assert not attach.is_attached(model)


def test_gradients_pass():
    model, ids = loaded("llama", "sdpa"), random_ids(9, 1)
    got = []
    for cache in (DynamicCache(), SparseCache(model, RaaS(64))):
        model.zero_grad()
        model(input_ids=ids, past_key_values=cache).logits.sum().backward()
        got.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert torch.equal(*got)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", *KERNELS])
@pytest.mark.parametrize("pads", [(0, 0), (37, 0)], ids=str)
def test_on_a_gpu(implementation, pads):
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("default"))
        package = KERNELS.get(implementation)
        if package is not None and importlib.util.find_spec(package.split(".")[0]) is None:
            pytest.skip(f"needs the package of {implementation}")
        shape = dict(hidden_size=256, head_dim=64, num_hidden_layers=2)
        shape["layer_types"] = ["full_attention"] * 2
        model = tiny_model("qwen3", torch.bfloat16, **shape).to("cuda")
        given = {name: t.to("cuda") for name, t in padded_inputs(211, *pads).items()}
        ids = given.pop("input_ids")
        plain = logits(model, DynamicCache(), ids, **given)[:, -1]
        try:
            model.set_attn_implementation(implementation)
        except ImportError as error:  # another of the packages is installed under this name
            pytest.skip(str(error))
        expected = logits(model, DynamicCache(), ids, **given)[:, -1]
        cache = SparseCache(model, RaaS(512))
        got = logits(model, cache, ids, **given)[:, -1]
        assert cache.report().prompt_attention == implementation
        assert torch.equal(got, expected)
        assert_close("against sdpa", got, plain, 3e-2)
        assert torch.equal(logits(model, DynamicCache(), ids, **given)[:, -1], expected)


def test_two_layers_may_differ():
    model, ids = shallow_model("llama"), random_ids(12, 2)
    cache = SparseCache(model, RaaS(64))
    own_attention._BEFORE[model.model.layers[1].self_attn] = "eager"
    logits(model, cache, ids)
    assert cache.report().prompt_attention == "sdpa, eager"
