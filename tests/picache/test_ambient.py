"""State around a forward that would change KV: refused by its own name, or part of the key."""

import gc
import re
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.utils._pytree import tree_map
from transformers import GPT2Config, GPT2LMHeadModel

from picache import PIC, CacheBlend, ChunkStore, FullRecompute, LegoLink, PICacheError
from picache.hf.ambient import ModelState
from tests.helpers import assert_close, random_ids, tiny_model

QUERY = random_ids(5, seed=9)
LENGTHS = (7, 12)


def compiled(pic):
    return [pic.compile(random_ids(n, seed=n)) for n in LENGTHS]


def dropout_model():
    return tiny_model("llama", attention_dropout=0.5)


def refused(model, says, around=nullcontext, change=None):
    """A change after PIC was made: compile, a hit and link are refused, and nothing is stored."""
    pic = PIC(model)
    chunks = compiled(pic)
    if change is not None:
        change(model)
    with around():
        for attempt in (
            lambda: pic.compile(random_ids(20)),
            lambda: pic.compile(random_ids(LENGTHS[0], seed=LENGTHS[0])),  # in the store
            lambda: pic.link(chunks, QUERY),
        ):
            with pytest.raises(PICacheError, match=says):
                attempt()
    assert len(pic.store) == len(LENGTHS)
    return pic, chunks


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.fixture
def accelerator():
    yield Accelerator(mixed_precision="bf16", cpu=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.parametrize(
    "change",
    [nn.Module.train, lambda model: model.model.layers[1].self_attn.train()],
    ids=["the model", "one module"],
)
def test_training_mode_is_refused_at_compile_and_link(change):
    model = dropout_model()
    pic, chunks = refused(model, r"is in training mode.*call model.eval\(\) first", change=change)
    model.eval()
    again = PIC(dropout_model(), store=pic.store)
    assert [chunk.key for chunk in compiled(again)] == [chunk.key for chunk in chunks]
    linked = pic.link(chunks, QUERY).logits
    assert torch.equal(linked, again.link(compiled(again), QUERY).logits)


def test_gradient_checkpointing_is_named_in_training_mode_and_harmless_outside():
    model = tiny_model("llama")
    expected = PIC(model).link(compiled(pic := PIC(model)), QUERY).logits
    model.gradient_checkpointing_enable()
    assert torch.equal(pic.link(compiled(pic), QUERY).logits, expected)
    model.train()
    with pytest.raises(PICacheError, match=r"training mode.*gradient checkpointing leaves out the"):
        pic.compile(random_ids(20))
    with pytest.raises(PICacheError, match=r"gradient checkpointing.*model.eval\(\)"):
        PIC(model)


def test_autocast_is_refused_by_its_name():
    says = "torch.autocast is on for 'cpu' in torch.bfloat16"
    refused(tiny_model("llama"), says, around=autocast)
    with autocast(), pytest.raises(PICacheError, match=says):
        PIC(tiny_model("llama"))


def test_autocast_of_a_device_that_no_weight_is_on_changes_nothing():
    pic = PIC(tiny_model("llama"))
    expected = pic.link(compiled(pic), QUERY).logits
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
        assert torch.equal(pic.link(compiled(pic), QUERY).logits, expected)


def test_autocast_that_a_wrapper_turns_on_inside_the_forward_is_refused():
    """As a forward wrapped after PIC was made; a chunk is stored only when it is right."""
    model = tiny_model("llama", dtype=torch.bfloat16)  # autocast shows in no dtype here
    pic = PIC(model)
    (chunk,) = [pic.compile(random_ids(9))]
    for part in (model, model.model):
        forward = part.forward
        part.forward = autocast()(forward)
        with pytest.raises(PICacheError, match=r"torch.autocast is on for 'cpu'"):
            pic.link([chunk, chunk], QUERY, LegoLink(2))
        part.forward = forward
    model.model.forward = autocast()(model.model.forward)
    with pytest.raises(PICacheError, match=r"torch.autocast is on for 'cpu'"):
        pic.compile(random_ids(20))
    assert len(pic.store) == 1


def test_a_model_that_an_accelerator_wraps_is_refused_by_name(accelerator):
    says = re.escape("Accelerator(mixed_precision=...) has wrapped the model")
    model = tiny_model("llama")
    pic = PIC(model)
    chunks, expected = compiled(pic), pic.link(compiled(pic), QUERY).logits
    wrapped = accelerator.prepare(model).eval()
    with pytest.raises(PICacheError, match=says):
        pic.link(chunks, QUERY)
    with pytest.raises(PICacheError, match=says):
        PIC(wrapped)
    bare = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert torch.equal(PIC(bare, store=pic.store).link(chunks, QUERY).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_changed_since_pic_is_refused_by_name(dtype):
    says = f"had weights in torch.float32 when PIC was made of it and has {dtype} now: make a new"
    refused(tiny_model("llama"), says, change=lambda model: model.to(dtype))


def test_a_dtype_changed_in_one_layer_alone_is_refused_by_the_weight():
    says = (
        r"\(model.layers.1.mlp.gate_proj.weight\) had weights in torch.float32.*torch.float64 now"
    )
    refused(tiny_model("llama"), says, change=lambda model: model.model.layers[1].mlp.double())


def test_weights_that_come_later_may_have_another_dtype():
    """As an adapter in float32 on a model in half precision; it is part of the key."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    pic = PIC(model)
    before = pic.compile(random_ids(9)).key
    model.model.layers[0].register_parameter("adapter", nn.Parameter(torch.ones(3)))
    assert pic.compile(random_ids(9)).key != before


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_every_parameter_and_buffer_is_seen_once(family):
    model = tiny_model(family, tie_word_embeddings=True)
    expected = [*model.named_parameters(), *model.named_buffers()]
    seen = ModelState.of(model).weights
    assert [name for name, _ in seen] == [name for name, _ in expected]
    assert all(mine is theirs for (_, mine), (_, theirs) in zip(seen, expected, strict=True))


def test_the_state_to_compare_with_keeps_no_replaced_weight_in_memory():
    model = tiny_model("llama")
    pic = PIC(model)
    old = weakref.ref(model.lm_head.weight)
    model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    pic.compile([5, 3])
    gc.collect()
    assert old() is None


def test_a_vocabulary_that_grows_or_shrinks_is_part_of_the_key():
    model = tiny_model("llama")
    pic = PIC(model)
    chunks = compiled(pic)
    model.resize_token_embeddings(160, mean_resizing=False)
    grown = pic.compile([159, 3, 4])
    with pytest.raises(PICacheError, match="compiled with another model"):
        pic.link(chunks, QUERY)
    model.resize_token_embeddings(64)
    with pytest.raises(PICacheError, match=r"token id 159, the model's vocabulary is 0\.\.63"):
        pic.compile([159, 3, 4])
    with pytest.raises(PICacheError, match="compiled with another model"):
        pic.link([grown], [3, 4])
    logits = pic.link([pic.compile([3, 4, 5]), pic.compile([6, 7])], [8], FullRecompute()).logits
    with torch.no_grad():
        assert_close("logits", logits, model(torch.tensor([[3, 4, 5, 6, 7, 8]])).logits[:, -1])


class Int8Linear(nn.Module):
    """Weights alone in int8, a scale a row."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))

    def forward(self, hidden):
        return hidden @ (self.weight.to(hidden.dtype) * self.scale).T


class Int8Activations(Int8Linear):
    """Activations too, by the largest of whatever is computed together."""

    def forward(self, hidden):
        scale = hidden.abs().amax() / 127
        return super().forward((hidden / scale).round() * scale)


def quantise(model, kind=Int8Linear):
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, kind(linear).eval())
    return model


def test_weights_alone_in_int8_link_exactly():
    model = quantise(tiny_model("llama"))
    model.hf_quantizer = type("FakeHfQuantizer", (), {})()  # how transformers marks them
    pic = PIC(model)
    prompt = pic.link(compiled(pic), QUERY, FullRecompute())
    with torch.no_grad():
        assert_close("logits", prompt.logits, model(prompt["input_ids"]).logits[:, -1])
    assert compiled(pic)[0].key != compiled(PIC(tiny_model("llama")))[0].key


class Int8Tensor(torch.Tensor):
    """As torchao keeps weights: a tensor around integers and a scale, which computes as floats."""

    @staticmethod
    def __new__(cls, integers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype)

    def __init__(self, integers, scale):
        self.integers, self.scale = integers, scale

    def __tensor_flatten__(self):
        return ["integers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].integers, args[0].scale)

        def plain(one):
            return one.integers * one.scale if isinstance(one, cls) else one

        return function(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def test_weights_made_of_other_tensors_are_told_apart_by_those():
    keys = []
    for scale in (0.02, 0.03, 0.03):
        model = tiny_model("llama")
        attention = model.model.layers[0].self_attn
        integers = (attention.k_proj.weight / 0.02).round().to(torch.int8)
        weight = Int8Tensor(integers, torch.tensor(scale))
        attention.k_proj.weight = nn.Parameter(weight, requires_grad=False)
        pic = PIC(model)
        prompt = pic.link(compiled(pic), QUERY, FullRecompute())
        with torch.no_grad():
            assert_close("logits", prompt.logits, model(prompt.input_ids).logits[:, -1])
        keys.append(compiled(pic)[0].key)
    assert keys[0] != keys[1] == keys[2]
    weight.scale.mul_(2)
    assert compiled(pic)[0].key not in keys


def test_quantised_activations_are_the_cause_that_is_named():
    with pytest.raises(PICacheError, match=r"quantised by torch.int8.*activations quantised by"):
        PIC(quantise(tiny_model("llama"), Int8Activations))


def test_plain_weights_of_a_gguf_file_are_not_blamed():
    """transformers sets its quantizer on such a model, whose weights it has dequantised."""
    model = tiny_model("llama")
    model.hf_quantizer = type("GgufHfQuantizer", (), {})()
    prompt = (pic := PIC(model)).link(compiled(pic), QUERY, FullRecompute())
    with torch.no_grad():
        assert_close("logits", prompt.logits, model(prompt.input_ids).logits[:, -1])
    learned = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=128)).eval()
    learned.hf_quantizer = model.hf_quantizer
    with pytest.raises(PICacheError, match=r"^GPT2LMHeadModel has no rotary embedding module"):
        PIC(learned)


def test_weights_packed_into_wider_integers_count_as_quantised():
    model = tiny_model("llama")
    model.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))
    model.register_buffer("position_ids", torch.zeros(1, 4, dtype=torch.int64))
    assert ModelState.of(model).quantised == "torch.int32 (qweight)"


def test_weights_packed_out_of_sight_are_refused():
    packed = tiny_model("llama")
    packed.model.layers[0].self_attn.q_proj = torch.ao.nn.quantized.dynamic.Linear(64, 64).eval()
    says = r"weights of 'model.layers.0.self_attn.q_proj' packed in a Linear.*cannot be told"
    with pytest.raises(PICacheError, match=says):
        PIC(packed)


def test_a_model_quantised_since_pic_is_refused_by_name():
    says = r"was not quantised when PIC was made of it and is quantised by torch.int8 .* now"
    refused(tiny_model("llama"), says, change=quantise)


@pytest.mark.parametrize("where", ["cpu", "disk", "meta"])
def test_weights_that_are_not_here_are_the_reason(where, tmp_path):
    def offload(model):
        if where == "cpu":
            cpu_offload(model, torch.device("cpu"))
        elif where == "disk":
            disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
        else:
            model.to("meta")

    says = r"\d+ of the 41 weights of LlamaForCausalLM are not in memory.*load the whole model"
    refused(tiny_model("llama"), says, change=offload)
    model = tiny_model("llama")
    offload(model)
    with pytest.raises(PICacheError, match=says):
        PIC(model)


def compile_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def compile_model(model):
    model.compile(backend="eager")


def compile_a_layer(model):
    model.model.layers[1].compile(backend="aot_eager")


@pytest.mark.parametrize("how", [compile_forward, compile_model, compile_a_layer])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_model_links_and_generates_as_it_does_without(how, when):
    plain = PIC(tiny_model("llama", num_hidden_layers=3))
    method = CacheBlend(0.3)
    prompt = plain.link(compiled(plain), QUERY, method)
    expected = plain.model.generate(**prompt, max_new_tokens=2, do_sample=False)
    model = tiny_model("llama", num_hidden_layers=3)
    if when == "before":
        how(model)
    pic = PIC(model)
    if when == "after":
        how(model)
    mine = pic.link(compiled(pic), QUERY, method)
    assert torch.equal(mine.logits, prompt.logits)
    assert torch.equal(model.generate(**mine, max_new_tokens=2, do_sample=False), expected)
    torch._dynamo.reset()


def test_linking_leaves_the_compiler_as_it_was():
    """Also when one link begins before another ends."""
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    twice = torch.compile(lambda x: x * 2, backend=backend)
    pics = [PIC(tiny_model("llama", seed=seed)) for seed in (1, 2)]

    def work(pic):
        for _ in range(4):
            pic.link(compiled(pic), QUERY)

    threads = [threading.Thread(target=work, args=(pic,)) for pic in pics]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert twice(torch.ones(2)).tolist() == [2, 2]
    assert len(calls) == 1
    torch._dynamo.reset()


def test_a_wrapped_model_names_what_to_hand_in():
    wrapped = torch.compile(tiny_model("llama"), backend="eager")
    with pytest.raises(PICacheError, match=r"OptimizedModule.*the model itself.*model.compile\(\)"):
        PIC(wrapped)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_a_float64_model_links_to_its_own_prefill(family):
    model = tiny_model(family, dtype=torch.float64)
    pic = PIC(model)
    prompt = pic.link(compiled(pic), QUERY, FullRecompute())
    with torch.no_grad():
        expected = model(prompt["input_ids"])
    assert prompt.logits.dtype == torch.float64
    assert_close("logits", prompt.logits, expected.logits[:, -1], 1e-12)
    naive = pic.link(compiled(pic)[:1], QUERY).past_key_values
    full = pic.hf.prefill(prompt["input_ids"][:, : LENGTHS[0]])
    for layer, (keys, values) in zip(naive.layers, full, strict=True):
        assert_close("keys", layer.keys[:, :, : LENGTHS[0]], keys, 1e-12)
        assert_close("values", layer.values[:, :, : LENGTHS[0]], values, 1e-12)


def test_a_forward_beside_a_link_is_refused_by_name_and_the_link_is_right():
    model = tiny_model("llama")
    pic = PIC(model)
    chunks = compiled(pic)
    expected = pic.link(chunks, QUERY).logits
    inside, go_on = threading.Event(), threading.Event()

    def wait(module, args):
        if threading.current_thread() is not threading.main_thread():
            return
        inside.set()
        assert go_on.wait(30)

    hook = model.model.layers[2].register_forward_pre_hook(wait)
    errors = []

    def beside():
        assert inside.wait(30)
        try:
            model.generate(random_ids(6)[None], max_new_tokens=3)
        except Exception as error:
            errors.append(error)
        go_on.set()

    thread = threading.Thread(target=beside)
    thread.start()
    logits = pic.link(chunks, QUERY).logits
    thread.join()
    hook.remove()
    (error,) = errors
    assert isinstance(error, PICacheError)
    assert re.search("another thread links a prompt.*share a lock", str(error), re.I)
    assert torch.equal(logits, expected)
    assert model(random_ids(6)[None]).logits.isfinite().all()


def test_a_forward_that_was_under_way_when_a_link_began_is_refused_by_name():
    model = tiny_model("llama")
    pic = PIC(model)
    chunks = compiled(pic)
    expected = pic.link(chunks, QUERY).logits
    inside, linking, done = threading.Event(), threading.Event(), threading.Event()

    def wait(module, args):
        if threading.current_thread() is threading.main_thread():
            linking.set()
            assert done.wait(30)
        else:
            inside.set()
            assert linking.wait(30)

    hook = model.model.layers[2].register_forward_pre_hook(wait)
    errors = []

    def beside():
        try:
            model(random_ids(6)[None])
        except Exception as error:
            errors.append(error)
        done.set()

    thread = threading.Thread(target=beside)
    thread.start()
    assert inside.wait(30)
    logits = pic.link(chunks, QUERY).logits
    thread.join()
    hook.remove()
    (error,) = errors
    assert isinstance(error, PICacheError)
    assert "another thread links a prompt" in str(error)
    assert torch.equal(logits, expected)


def test_nothing_of_a_refused_compile_is_on_disk(tmp_path):
    pic = PIC(dropout_model(), store=ChunkStore(path=tmp_path))
    with autocast(), pytest.raises(PICacheError, match="autocast"):
        pic.compile(random_ids(9))
    pic.model.train()
    with pytest.raises(PICacheError, match="training mode"):
        pic.compile(random_ids(9))
    assert not list(tmp_path.rglob("*.safetensors"))
