"""What chunks are compiled behind: dummies, a shared prefix, a BOS dropped or kept."""

import pytest
import torch

from picache import PIC, DummySinks, FullRecompute, LegoLink, PICacheError, SharedPrefix
from tests.helpers import assert_close, random_ids, tiny_model
from tests.picache.helpers import compiled

BOS = 1
SINKS = {
    "drop": (BOS,),
    "dummies": (BOS,) * 4,
    "other dummies": (9, 9),
    "shared": (BOS, 5, 6, 7),
}


def policy(name):
    if name == "drop":
        return "drop"
    if name == "shared":
        return SharedPrefix(SINKS[name])
    return DummySinks(len(SINKS[name]), token=None if name == "dummies" else 9)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_sliding"])
@pytest.mark.parametrize("name", SINKS)
def test_what_is_linked_is_what_follows_the_sinks(name, family):
    """Compiled by hand behind the sinks, at a position that puts the chunk in its place."""
    pic = PIC(tiny_model(family), sinks=policy(name), flops_per_byte=None)
    bos = torch.tensor([BOS])
    bodies = [random_ids(n, seed=n) for n in (12, 21, 1)]
    chunks = [pic.compile(torch.cat([bos, body])) for body in bodies]
    query = random_ids(4, seed=9)
    prompt = pic.link(chunks, query, LegoLink(0))
    text = torch.cat([bos, *bodies, query])
    assert prompt["input_ids"][0].tolist() == text.tolist(), "no sink comes into the prompt"
    lead = torch.tensor(SINKS[name])
    start = 13
    layers = prompt["past_key_values"].layers
    for body in bodies[1:]:
        by_hand = pic.hf.prefill(torch.cat([lead, body])[None], start - len(lead))
        for layer, (keys, values) in zip(layers, by_hand, strict=True):
            here = slice(start, start + len(body))
            assert_close("keys", layer.keys[:, :, here], keys[:, :, len(lead) :], 1e-4)
            assert_close("values", layer.values[:, :, here], values[:, :, len(lead) :])
        start += len(body)
    first = pic.hf.prefill(text[None, :13])
    for layer, (keys, _) in zip(layers, first, strict=True):
        assert_close("the exact prefix", layer.keys[:, :, :13], keys)


@pytest.mark.parametrize("sinks", ["drop", "keep", DummySinks(3), SharedPrefix((BOS, 4))], ids=repr)
def test_recomputing_everything_is_exact_behind_any_sinks(sinks):
    model = tiny_model("qwen3")
    pic = PIC(model, sinks=sinks, flops_per_byte=None)
    bos = torch.tensor([BOS])
    documents = [torch.cat([bos, random_ids(n, seed=n)]) for n in (5, 17, 8)]
    prompt = pic.link(compiled(pic, documents), random_ids(3), FullRecompute())
    with torch.no_grad():
        logits = model(prompt["input_ids"]).logits[:, -1]
    assert_close("logits", prompt.logits, logits)
    expected = 6 + 18 + 9 + 3 if sinks == "keep" else 6 + 17 + 8 + 3
    assert prompt.report.tokens_total == expected


def test_a_first_chunk_is_compiled_behind_nothing():
    pic = PIC(tiny_model("llama"), sinks=DummySinks(4))
    document = random_ids(10)
    middle, first = pic.compile(document), pic.compile(document, first=True)
    assert middle.key != first.key
    assert first.nbytes * 14 == middle.nbytes * 10
    prompt = pic.link([first, middle], random_ids(2))
    assert prompt.report.chunk_hits == (True, True)
    pic.store.clear()
    again = pic.link([middle, first], random_ids(2))
    assert again.report.chunk_hits == (False, False)
    assert torch.equal(prompt.logits, again.logits)


def test_keys_tell_sinks_apart():
    model, document = tiny_model("llama"), random_ids(10)
    policies = ("drop", DummySinks(1), DummySinks(2), SharedPrefix((BOS, 3)))
    chunks = [PIC(model, sinks=one).compile(document) for one in policies]
    assert len({chunk.key for chunk in chunks}) == 4
    with pytest.raises(PICacheError, match="another model, dtype, weights or sinks"):
        PIC(model, sinks=DummySinks(2)).link([chunks[1]], random_ids(2))


def test_the_same_pic_behind_other_sinks_is_another_pic_with_them():
    model = tiny_model("llama")
    documents = [random_ids(n, seed=n) for n in (5, 9, 12)]
    first = PIC(model, sinks="drop")
    for sinks in ("keep", DummySinks(3, token=7), "drop"):
        behind, made = first.behind(sinks), PIC(model, sinks=sinks)
        assert behind.sinks == sinks
        assert behind.store is first.store
        ours, theirs = compiled(behind, documents), compiled(made, documents)
        assert ours == theirs
        query = random_ids(4, seed=4)
        linked = behind.link(ours, query, LegoLink(2)), made.link(theirs, query, LegoLink(2))
        assert torch.equal(linked[0].logits, linked[1].logits)
    assert first.sinks == "drop"
    with pytest.raises(PICacheError, match="sinks must be 'drop', 'keep'"):
        first.behind("none")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DummySinks(0), "at least 1 dummies, got 0"),
        (lambda: PIC(tiny_model("llama"), sinks="none"), "sinks must be 'drop', 'keep'"),
        (lambda: PIC(tiny_model("llama"), sinks=SharedPrefix(())), "the shared prefix is empty"),
        (lambda: PIC(tiny_model("llama"), sinks=SharedPrefix("a")), "has no tokenizer"),
        (lambda: PIC(tiny_model("llama"), sinks=DummySinks(2, 999)), "token id 999"),
        (
            lambda: PIC(tiny_model("llama", bos_token_id=None), sinks=DummySinks(2)),
            "no BOS to take as a dummy",
        ),
    ],
)
def test_bad_sinks_name_the_value(make, message):
    with pytest.raises(PICacheError, match=message):
        make()
