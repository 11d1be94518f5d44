"""What a key is made of: each thing that changes KV finds another key, or is refused.

docs/picache.md, "What a key is made of", is this list in words.
"""

import copy

import pytest
import torch

from picache import PIC, ChunkStore, DummySinks, LegoLink, PICacheError, SharedPrefix
from tests.helpers import assert_close, random_ids, tiny_model

IDS = random_ids(40, seed=3)
CONFIGURATION = {
    "sliding_window": 8,
    "rms_norm_eps": 1e-2,
    "hidden_act": "gelu",
    "attention_dropout": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    "max_position_embeddings": 256,
    "num_experts_per_tok": 1,
    "attn_logit_softcapping": 5.0,
    "layer_types": ["full_attention"] * 4,
    "some_setting_of_tomorrow": True,
}


def key(model, ids=IDS, first=False, store=None, **options):
    return PIC(model, store=store, **options).compile(ids, first).key


@pytest.fixture
def model():
    return tiny_model("mistral_sliding")


@pytest.mark.parametrize(("name", "value"), CONFIGURATION.items())
def test_a_setting_changed_after_pic_was_made_finds_another_key(model, name, value):
    pic = PIC(model)
    before = pic.compile(IDS)
    setattr(model.config, name, value)
    after = pic.compile(IDS)
    assert after.key != before.key
    assert pic.store.misses == 2
    with pytest.raises(PICacheError, match="compiled with another model"):
        pic.link([before], random_ids(3))
    setattr(model.config, name, getattr(tiny_model("mistral_sliding").config, name, None))


def test_what_is_linked_after_a_setting_was_changed_is_what_a_new_pic_links(model):
    pic = PIC(model)
    texts, query = [random_ids(n, seed=n) for n in (30, 40, 25)], random_ids(4)
    before = pic.link([pic.compile(text) for text in texts], query, LegoLink(3)).logits
    model.config.sliding_window = 6
    after = pic.link([pic.compile(text) for text in texts], query, LegoLink(3)).logits
    new = PIC(model)
    expected = new.link([new.compile(text) for text in texts], query, LegoLink(3)).logits
    assert torch.equal(after, expected)
    assert (after - before).norm() > 0.01 * before.norm()
    whole = pic.link([pic.compile(text) for text in texts], query, LegoLink(40)).logits
    with torch.no_grad():
        assert_close("full", whole, model(torch.cat([*texts, query])[None]).logits[:, -1], 1e-4)


@pytest.mark.parametrize("where", ["measure", "check"])
def test_a_setting_changed_to_what_cannot_be_linked_is_refused(model, monkeypatch, where):
    """The proof that was made with other settings is made again, until it holds."""
    from picache.hf.model import HFModel

    pic = PIC(model)
    refusing = [True]
    original = HFModel._measure

    def refuses(*args):
        if refusing[0]:
            raise PICacheError("no longer")
        return original(*args) if where == "measure" else None

    if where == "measure":
        monkeypatch.setattr(HFModel, "_measure", refuses)
    else:
        monkeypatch.setattr(pic, "_check", refuses)
    pic.compile(IDS)
    model.config.sliding_window = 6
    for _ in range(2):
        with pytest.raises(PICacheError, match="no longer"):
            pic.compile(IDS)
    refusing[0] = False
    assert pic.compile(IDS).key == key(model)


def change_weight(model):
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 5] += 1e-3


def change_through_data(model):
    for parameter in model.model.layers[1].mlp.parameters():
        parameter.data += 1e-3


def exchange_rows(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[[3, 4]] = model.model.embed_tokens.weight[[4, 3]]


def replace_layer(model):
    model.model.layers[1] = copy.deepcopy(model.model.layers[2])
    model.model.layers[1].self_attn.layer_idx = 1


def change_frequencies(model):
    model.model.rotary_emb.inv_freq.mul_(1.5)


def set_revision(model):
    model.config._commit_hash = "0123456789abcdef"


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        change_through_data,
        exchange_rows,
        replace_layer,
        change_frequencies,
        set_revision,
    ],
)
def test_other_weights_buffers_and_revisions_find_another_key(model, change):
    pic = PIC(model)
    before = pic.compile(IDS).key
    change(model)
    assert key(model) != before
    assert pic.compile(IDS).key != before


def make_training(model):
    model.train()


def make_one_module_training(model):
    model.model.layers[2].self_attn.train()


def make_double(model):
    model.double()


@pytest.mark.parametrize("change", [make_training, make_one_module_training, make_double])
def test_another_state_of_the_model_is_refused(model, change):
    pic = PIC(model)
    chunk = pic.compile(IDS)
    change(model)
    with pytest.raises(PICacheError):
        pic.compile(IDS)
    with pytest.raises(PICacheError):
        pic.link([chunk], random_ids(3))


def test_autocast_is_refused(model):
    pic = PIC(model)
    chunk = pic.compile(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(PICacheError, match="autocast"):
            pic.compile(IDS)
        with pytest.raises(PICacheError, match="autocast"):
            pic.link([chunk], random_ids(3))


def test_everything_a_key_is_made_of_tells_chunks_apart():
    def made(name="llama", ids=IDS, first=False, seed=0, dtype=torch.float32, **options):
        stores = ("namespace", "storage")
        store = ChunkStore(**{n: options.pop(n) for n in stores if n in options})
        return key(tiny_model(name, dtype, seed), ids, first, store, **options)

    keys = [
        made(),
        made(ids=IDS[:-1]),
        made(ids=IDS.flip(0)),
        made(ids=torch.cat([IDS[:1], IDS])),
        made("qwen2"),
        made("mistral"),
        made(seed=1),
        made(dtype=torch.bfloat16),
        made(dtype=torch.float16),
        made(dtype=torch.float64),
        made(namespace="tenant"),
        made(namespace="Tenant"),
        made(storage="int8"),
        made(storage="fp8"),
        made(sinks=DummySinks(2)),
        made(sinks=DummySinks(3)),
        made(sinks=DummySinks(2, token=9)),
        made(sinks=SharedPrefix((7, 8, 9))),
        made(sinks=SharedPrefix((7, 8, 10))),
    ]
    assert len(set(keys)) == len(keys)


def test_what_does_not_change_kv_shares_a_key(model):
    before = key(model)
    assert key(copy.deepcopy(model)) == before
    assert key(model, IDS.tolist()) == before
    assert key(model, sinks="keep") == before
    assert key(model, first=True, sinks=DummySinks(2)) == before
    assert key(model, flops_per_byte=None) == before
    model.config._name_or_path = "elsewhere"
    model.generation_config.max_new_tokens = 5
    assert key(model) == before
    model.set_attn_implementation("eager")  # the same up to rounding, as on another device
    assert key(model) == before


def test_an_unchanged_model_is_measured_once(model, monkeypatch):
    from picache.hf.model import HFModel

    pic = PIC(model)
    chunks = [pic.compile(random_ids(n, seed=n)) for n in (9, 30)]
    monkeypatch.setattr(HFModel, "_measure", lambda self: pytest.fail("measured again"))
    for _ in range(2):
        pic.link(chunks, random_ids(3))
        pic.compile(IDS)
