"""Bad input: an error that names the value and the remedy, and nothing changed."""

import subprocess
import sys

import pytest
import torch
import transformers

import picache
from picache import PIC, ChunkStore, LegoLink, LinkMethod, PICacheError, RandomRecompute
from tests.helpers import SHAPE, files_importing, random_ids, tiny_model
from tests.picache.helpers import chunks_of, compiled


@pytest.fixture
def pic():
    return PIC(tiny_model("llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [(12,), (7, 20, 33)])
def test_the_whole_prompt_fed_again_is_refused(dtype, lengths):
    pic = PIC(tiny_model("llama", dtype=dtype))
    model = pic.model
    documents = [random_ids(n, seed=n) for n in lengths]
    prompt = pic.link(compiled(pic, documents), random_ids(5, seed=2))
    covered, cache = prompt["input_ids"][:, :-1], prompt["past_key_values"]
    with pytest.raises(PICacheError, match=r"already holds \d+ tokens.*at least one token more"):
        model.generate(covered, past_key_values=cache, max_new_tokens=2)
    used = prompt["past_key_values"]
    first = model.generate(
        prompt["input_ids"], past_key_values=used, max_new_tokens=3, do_sample=False
    )
    with pytest.raises(PICacheError, match="take a fresh cache from the prompt"):
        model.generate(prompt["input_ids"], past_key_values=used, max_new_tokens=3)
    again = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert torch.equal(first, again)


def test_a_covered_padded_batch_is_refused(pic):
    rows = [chunks_of(pic, *lengths) for lengths in ((5, 9), (14, 8))]
    prompt = pic.link(rows, [random_ids(3), random_ids(4)])
    covered = {name: prompt[name][:, :-1] for name in ("input_ids", "attention_mask")}
    with pytest.raises(PICacheError, match="already holds 25 tokens"):
        pic.model.generate(**covered, past_key_values=prompt["past_key_values"], max_new_tokens=2)


def test_assisted_decoding_is_refused(pic):
    prompt = pic.link([pic.compile(random_ids(n)) for n in (7, 12)], random_ids(5))
    with pytest.raises(PICacheError, match="leave out assistant_model and prompt_lookup"):
        pic.model.generate(**prompt, prompt_lookup_num_tokens=3, max_new_tokens=5, eos_token_id=2)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], "a document is empty"),
        ([3, 128], r"token id 128, the model's vocabulary is 0\.\.127"),
        ([3, -1], "token id -1"),
        (torch.zeros(2, 3, dtype=torch.int64), r"shape \(2, 3\)"),
        (torch.zeros(3), "dtype torch.float32"),
        (list(range(3, 120)) * 5, "585 tokens is longer than the model's 512"),
        ("some text", "has no tokenizer"),
        (None, r"a document must be a text.*got NoneType"),
        (["a", "b"], r"a document must be a text.*got list"),
    ],
)
def test_bad_documents(pic, document, says):
    with pytest.raises(PICacheError, match=says):
        pic.compile(document)
    assert len(pic.store) == 0


def test_bad_links(pic):
    chunk = pic.compile(random_ids(9))
    with pytest.raises(PICacheError, match="at least one chunk"):
        pic.link([], random_ids(3))
    with pytest.raises(PICacheError, match="the query is empty"):
        pic.link([chunk], [])
    with pytest.raises(PICacheError, match="got str at place 1"):
        pic.link([chunk, "text"], random_ids(3))
    with pytest.raises(PICacheError, match="as many queries"):
        pic.link([[chunk], [chunk]], random_ids(3))
    with pytest.raises(PICacheError, match="got str at place 0"):
        pic.link(["text"], random_ids(3))
    with pytest.raises(PICacheError, match="got Chunk"):
        pic.link(chunk, random_ids(3))
    with pytest.raises(PICacheError, match=r"the query must be a text.*got NoneType"):
        pic.link([chunk], None)
    for method in (LegoLink, "naive"):
        with pytest.raises(PICacheError, match="is no link method"):
            pic.link([chunk], random_ids(3), method)
    with pytest.raises(PICacheError, match="positions for 512"):
        pic.link([chunk] * 60, random_ids(3))
    with pytest.raises(PICacheError, match="compiled with another model"):
        PIC(tiny_model("llama", seed=3)).link([chunk], random_ids(3))
    with torch.no_grad():
        pic.model.model.layers[1].mlp.down_proj.weight[10:] += 1
    with pytest.raises(PICacheError, match="compiled with another model"):
        pic.link([chunk], random_ids(3))


def test_a_batch_with_a_bad_row_leaves_the_store_alone():
    model = tiny_model("llama")
    one = PIC(model).compile(random_ids(20)).nbytes
    pic = PIC(model, store=ChunkStore(device_bytes=one))
    chunks = [pic.compile(random_ids(20, seed=s)) for s in (1, 2)]
    with pytest.raises(PICacheError, match="positions for 512"):
        pic.link([[chunks[0]], [chunks[1]] * 30], [random_ids(3)] * 2)
    assert chunks[1].key in pic.store
    assert pic.store.misses == 2


def test_a_method_may_not_touch_the_prefix_or_the_query(pic):
    class Greedy(LinkMethod):
        def recompute(self, layout, evidence):
            return torch.tensor([0])

    chunks = [pic.compile(random_ids(n)) for n in (5, 6)]
    with pytest.raises(PICacheError, match=r"positions 0\.\.0; only 5\.\.10"):
        pic.link(chunks, random_ids(3), Greedy())


@pytest.mark.parametrize("k", [-1, 2.5, "4", True])
@pytest.mark.parametrize("method", [LegoLink, RandomRecompute])
def test_k_is_a_whole_number(method, k):
    with pytest.raises(PICacheError, match=f"whole number k >= 0 of tokens per chunk, got {k!r}"):
        method(k)


def test_unknown_models_are_refused():
    with pytest.raises(PICacheError, match="got Linear"):
        PIC(torch.nn.Linear(2, 2))
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
        )
    ).eval()
    with pytest.raises(PICacheError, match="attention interface"):
        PIC(falcon)
    with pytest.raises(PICacheError, match=r"call model.eval\(\) first"):
        PIC(tiny_model("llama").train())
    with pytest.raises(PICacheError, match=r"sinks must be 'drop', 'keep', .*got 'no'"):
        PIC(tiny_model("llama"), sinks="no")


def test_an_error_inside_the_pass_leaves_nothing_attached(pic):
    model = pic.model
    chunks = chunks_of(pic, 5, 6)
    implementation = model.config._attn_implementation
    broken = model.model.layers[2].mlp.register_forward_pre_hook(lambda m, a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pic.link(chunks, random_ids(3))
    broken.remove()
    assert model.config._attn_implementation == implementation
    logits = pic.link(chunks, random_ids(3), LegoLink(6)).logits
    with torch.no_grad():
        ids = torch.cat([random_ids(5, seed=5), random_ids(6, seed=6), random_ids(3)])
        assert torch.allclose(logits, model(ids[None]).logits[:, -1], atol=1e-5)


def test_a_batch_that_does_not_fit_the_cache(pic):
    model = pic.model
    row = [pic.compile(random_ids(5))]
    prompt = pic.link([row, row], [random_ids(3)] * 2)
    with pytest.raises(PICacheError, match="batch of 2, the model was given 3"):
        model(random_ids(1, 3), past_key_values=prompt["past_key_values"])


def test_import_loads_no_transformers_and_no_sibling():
    code = (
        "import sys, picache; "
        "print(sorted(m for m in ('transformers', 'sparsity', 'demand') if m in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_transformers_is_touched_in_files_that_say_so():
    assert files_importing("transformers", picache) == {
        "hf/ambient.py",
        "hf/attention_switch.py",
        "hf/cache.py",
        "hf/padded_forward.py",
        "hf/decoding.py",
        "hf/linked_cache.py",
        "hf/model.py",
        "hf/padded_pass.py",
        "hf/tensor_parallel.py",
    }


def test_bos_in_the_middle_is_dropped_or_kept():
    model = tiny_model("llama")
    documents = [torch.cat([torch.tensor([1]), random_ids(n, seed=n)]) for n in (6, 7)]
    query = torch.cat([torch.tensor([1]), random_ids(3)])
    dropping, keeping = PIC(model), PIC(model, sinks="keep")
    dropped = dropping.link(compiled(dropping, documents), query, LegoLink(99))
    kept = keeping.link(compiled(keeping, documents), query, LegoLink(99))
    assert dropped["input_ids"].tolist() == [
        [*documents[0].tolist(), *documents[1][1:].tolist(), *query[1:].tolist()]
    ]
    assert kept["input_ids"].tolist() == [[*torch.cat([*documents, query]).tolist()]]
    for prompt in (dropped, kept):
        with torch.no_grad():
            expected = model(prompt["input_ids"]).logits[:, -1]
        assert torch.allclose(prompt.logits, expected, atol=1e-5)
    lonely = [dropping.compile(documents[0]), dropping.compile(torch.tensor([1]))]
    with pytest.raises(PICacheError, match="only a BOS"):
        dropping.link(lonely, query)


def test_configuration_is_read_from_the_model_not_from_a_list():
    """A vocabulary and positions of any size are taken from the model at hand."""
    config = transformers.LlamaConfig(**{**SHAPE, "vocab_size": 64, "max_position_embeddings": 32})
    pic = PIC(transformers.LlamaForCausalLM(config).eval())
    with pytest.raises(PICacheError, match=r"0\.\.63"):
        pic.compile([64])
    with pytest.raises(PICacheError, match="longer than the model's 32 positions"):
        pic.compile(list(range(33)))
