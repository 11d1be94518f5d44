"""What is handed in: the common shapes are taken, wrong objects are named with what to write."""

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from picache import APE, PIC, ChunkStore, DummySinks, LegoLink, LinkMethod, PICacheError
from tests.helpers import random_ids, tiny_model

QUERY = random_ids(3)


@pytest.fixture(scope="module")
def pic():
    return PIC(tiny_model("llama"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"store": ChunkStore}, r"got the class ChunkStore: give store=ChunkStore\(\)"),
        ({"store": "kv"}, r"store must be a ChunkStore, got .*store=ChunkStore\(path='kv'\)"),
        ({"store": Path("kv")}, r"got PosixPath: .*store=ChunkStore\(path='kv'\)"),
        ({"store": {}}, "store must be a ChunkStore, got dict"),
        ({"sinks": DummySinks}, r"sinks must be 'drop', .*got <class"),
        ({"sinks": ["drop"]}, r"sinks must be 'drop', .*got \['drop'\]"),
        ({"tokenizer": ChunkStore()}, r"tokenizer is a ChunkStore: write PIC\(model, store="),
        ({"tokenizer": "gpt2"}, r"AutoTokenizer.from_pretrained\('gpt2'\)"),
        ({"tokenizer": transformers.AutoTokenizer}, "got the class AutoTokenizer"),
        ({"tokenizer": Tokenizer(models.BPE())}, r"got Tokenizer: .*tokenizer_object="),
    ],
    ids=str,
)
def test_wrong_objects_are_named_by_pic(arguments, says):
    with pytest.raises(PICacheError, match=says):
        PIC(tiny_model("llama"), **arguments)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("org/name", r"got the text 'org/name': .*from_pretrained\('org/name'\)"),
        (transformers.LlamaForCausalLM, r"the class LlamaForCausalLM: give an instance of it"),
        (None, "got NoneType: load it with AutoModelForCausalLM.from_pretrained"),
    ],
)
def test_wrong_models_are_named(model, says):
    with pytest.raises(PICacheError, match=says):
        PIC(model)


def test_wrong_lists_of_chunks_are_named(pic):
    one = pic.compile(random_ids(5))
    for chunks, query, says in [
        ([[one], one], [QUERY, QUERY], r"list of lists of chunks.*another is Chunk.*\[\[a, b\]"),
        ([one, [one]], QUERY, "got list at place 1: .*a batch is a list of lists"),
        ([[one], "text"], [QUERY, QUERY], "list of lists of chunks.*another is the text 'text'"),
        ([random_ids(5)], QUERY, "got Tensor at place 0: compile the document first"),
        ([[one], []], [QUERY, QUERY], "at least one chunk"),
        (one, QUERY, "chunks must be a list"),
        ([one], one, "the query must be a text, .*got Chunk"),
    ]:
        with pytest.raises(PICacheError, match=says):
            pic.link(chunks, query)
    for method in (LegoLink, LinkMethod, "LegoLink", 16):
        with pytest.raises(PICacheError, match="is no link method: give one such as LegoLink"):
            pic.link([one], QUERY, method)


@pytest.mark.parametrize("path", [3, b"kv", ["kv"]], ids=repr)
def test_a_path_that_is_none_is_named(path):
    with pytest.raises(PICacheError, match=r"path must be a local folder .*give path='~/chunks'"):
        ChunkStore(path=path)


def test_a_namespace_that_is_no_text_is_named(tmp_path):
    with pytest.raises(PICacheError, match="namespace must be a text, got 3"):
        ChunkStore(path=tmp_path, namespace=3)


def test_a_path_in_the_home_folder_expands(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pic = PIC(tiny_model("llama"), store=ChunkStore(path="~/chunks"))
    pic.compile(random_ids(5))
    assert len(list((tmp_path / "chunks").rglob("*.safetensors"))) == 1
    assert not (tmp_path / "~").exists()
    with pytest.raises(PICacheError, match="give an absolute path"):
        ChunkStore(path="~nobody-of-that-name/chunks")


def test_a_prompt_has_the_attributes_of_an_encoding(pic):
    chunks = [pic.compile(random_ids(n, seed=n)) for n in (5, 9)]
    prompt = pic.link(chunks, QUERY)
    assert prompt.input_ids is prompt["input_ids"]
    assert prompt.attention_mask is prompt["attention_mask"]
    assert prompt.past_key_values is not prompt.past_key_values
    assert prompt.past_key_values.get_seq_length() == 16
    assert [len(chunk) for chunk in chunks] == [5, 9]


def test_a_prompt_moves_to_a_device_in_place(pic):
    prompt = pic.link([pic.compile(random_ids(5))], QUERY)
    expected = pic.model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert prompt.to("cpu") is prompt
    assert torch.equal(pic.model.generate(**prompt, max_new_tokens=3, do_sample=False), expected)
    gone = pic.link([pic.compile(random_ids(5))], QUERY).to("meta")
    tensors = [gone.input_ids, gone.attention_mask, gone.logits]
    tensors += [
        part for layer in gone.past_key_values.layers for part in (layer.keys, layer.values)
    ]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    beside = pic.link([pic.compile(random_ids(n, seed=n)) for n in (4, 5, 6)], QUERY, APE())
    assert beside.to("cpu") is beside
    with pytest.raises(PICacheError, match="move the model, make a new PIC and link there"):
        beside.to("meta")


def test_pic_says_what_it_is(tmp_path):
    pic = PIC(tiny_model("llama"), sinks=DummySinks(2), store=ChunkStore(device_bytes=4e9))
    for part in (
        "LlamaForCausalLM, 4 layers, torch.float32, no tokenizer",
        "sinks=DummySinks(count=2, token=None)",
        "ChunkStore(0 chunks, exact",
    ):
        assert part in repr(pic)
