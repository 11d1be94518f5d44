"""Calibration proves a rotation or refuses; moved keys are the keys of the new place."""

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from picache import PIC, FullRecompute, PICacheError
from picache.hf.rope import Rotation, calibrate, difference, frequencies, rotate
from tests.helpers import FAMILIES, SHAPE, assert_close, random_ids, tiny_model
from tests.picache.helpers import chunks_of, compiled

THETA = dict(rope_theta=10000.0)


def random_model(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    return model


SUPPORTED = {
    "interleaved": (
        transformers.CohereConfig(**SHAPE),
        Rotation("interleaved", "interleaved", 16),
    ),
    "partial": (
        transformers.PhiConfig(**SHAPE, partial_rotary_factor=0.5),
        Rotation("half", "half", 8),
    ),
    "llama3": (
        transformers.LlamaConfig(
            **SHAPE,
            rope_parameters=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
                **THETA,
            ),
        ),
        Rotation("half", "half", 16),
    ),
    "yarn": (
        transformers.LlamaConfig(
            **SHAPE,
            rope_parameters=dict(
                rope_type="yarn", factor=4.0, original_max_position_embeddings=128, **THETA
            ),
        ),
        Rotation("half", "half", 16),
    ),
    "linear": (
        transformers.LlamaConfig(
            **SHAPE, rope_parameters=dict(rope_type="linear", factor=4.0, **THETA)
        ),
        Rotation("half", "half", 16),
    ),
}


@pytest.mark.parametrize("kind", SUPPORTED)
def test_other_rotary_kinds_link_exactly(kind):
    config, rotation = SUPPORTED[kind]
    pic = PIC(random_model(config), flops_per_byte=None)
    found = pic.hf.rotations[0]
    assert (found.pairing, found.rotary_dim) == (rotation.pairing, rotation.rotary_dim)
    documents = [random_ids(n, seed=n) for n in (9, 21, 14)]
    query = random_ids(5, seed=5)
    prompt = pic.link(compiled(pic, documents), query, FullRecompute())
    with torch.no_grad():
        expected = pic.model(torch.cat([*documents, query])[None]).logits[:, -1]
    assert_close("logits", prompt.logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_zero_keys_moved_are_the_keys_of_full_prefill(family):
    """Layer 0 does not depend on context, so this is the whole of re-rotation, end to end."""
    from picache import NaiveReuse

    pic = PIC(tiny_model(family), flops_per_byte=None)
    documents = [random_ids(n, seed=n) for n in (9, 21, 14)]
    query = random_ids(5, seed=5)
    linked = pic.link(compiled(pic, documents), query, NaiveReuse())
    full = pic.hf.prefill(torch.cat([*documents, query])[None])
    layer = linked["past_key_values"].layers[0]
    assert_close("keys", layer.keys, full[0][0][:, :, :-1])
    assert_close("values", layer.values, full[0][1][:, :, :-1])


def test_moving_half_precision_keys_costs_one_rounding():
    keys = torch.randn(1, 2, 64, 8).bfloat16()
    old, new = (angles_at(torch.arange(s, s + 64), 1.0) for s in (0, 3000))
    turn = difference(old, new)
    error = rotate(keys, turn, "half").float() - rotate(keys.float(), turn, "half")
    assert error.abs().max() <= 2**-8 * keys.float().abs().max() * 2**0.5


def longrope(original=128):
    factors = dict(
        short_factor=[1 + i / 10 for i in range(8)], long_factor=[2.0 + i for i in range(8)]
    )
    return transformers.Phi3Config(
        **SHAPE,
        original_max_position_embeddings=original,
        rope_parameters=dict(
            rope_type="longrope", original_max_position_embeddings=original, **factors, **THETA
        ),
    )


def dynamic():
    return transformers.LlamaConfig(
        **SHAPE, rope_parameters=dict(rope_type="dynamic", factor=4.0, **THETA)
    )


def links_exactly(pic, lengths, query=5):
    documents = [random_ids(n, seed=n) for n in lengths]
    question = random_ids(query, seed=5)
    prompt = pic.link(compiled(pic, documents), question, FullRecompute())
    ids = torch.cat([*documents, question])[None]
    with torch.no_grad():
        expected = pic.model(ids).logits[:, -1]
    assert_close("logits", prompt.logits, expected)
    return prompt, ids


def test_longrope_links_up_to_the_length_its_frequencies_hold_for():
    pic = PIC(random_model(longrope()))
    links_exactly(pic, (9, 21, 14))
    links_exactly(pic, (40, 60, 23))  # 128 tokens, the last with the short frequencies
    chunks = chunks_of(pic, 40, 60, 24)
    with pytest.raises(PICacheError, match=r"prompt of 129 tokens.*with 24.*at most 128 tokens"):
        pic.link(chunks, random_ids(5))
    links_exactly(pic, (200, 5)[:1])  # one chunk beyond: compiled with the long frequencies
    with pytest.raises(PICacheError, match=r"prompt of 229 tokens.*compiled with 24"):
        pic.link([pic.compile(random_ids(200, seed=200)), chunks[2]], random_ids(5))


def test_longrope_generates_as_a_full_prefill_does():
    pic = PIC(random_model(longrope()))
    prompt, ids = links_exactly(pic, (9, 21, 14))
    run = dict(max_new_tokens=20, do_sample=False)
    model = pic.model
    assert torch.equal(model.generate(**prompt, **run), model.generate(ids, **run))


@pytest.mark.parametrize("config", [longrope(), dynamic()], ids=["longrope", "dynamic"])
def test_a_long_forward_between_changes_nothing(config):
    """Such rotary modules keep the frequencies of the last text; chunks stay valid all the same."""
    pic = PIC(random_model(config))
    model = pic.model
    chunk, fingerprint = pic.compile(random_ids(9, seed=9)), pic.hf.header("", "exact").fingerprint
    before = [p.clone() for p in pic.hf.rotary._module.buffers()]
    with torch.no_grad():
        model(random_ids(900, 1))
        model(random_ids(5, 1))
    if not all(map(torch.equal, before, pic.hf.rotary._module.buffers())):
        with pytest.raises(PICacheError, match="does not go back"):  # transformers 5.4, dynamic
            pic.compile(random_ids(8))
        return
    assert pic.hf.header("", "exact").fingerprint == fingerprint
    links_exactly(pic, (9, 21, 14))
    with torch.no_grad():
        model(random_ids(900, 1))
    assert torch.equal(
        pic.store.get(chunk.key).layer(0)[0], pic.hf.prefill(random_ids(9, seed=9)[None])[0][0]
    )


def test_dynamic_is_exact_up_to_all_of_the_models_positions():
    model = random_model(dynamic())
    before = copy.deepcopy(list(model.model.rotary_emb.buffers()))
    pic = PIC(model)
    assert all(map(torch.equal, before, model.model.rotary_emb.buffers())), "the model was changed"
    links_exactly(pic, (250, 150, 107))  # 512, as many as the model has


def test_a_model_without_rotary_positions_is_refused():
    model = random_model(transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4))
    with pytest.raises(PICacheError, match="no rotary embedding module"):
        PIC(model)


def cos_sin(layer, positions):
    angles = positions[:, None].float() * torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2)
    return angles.cos(), angles.sin()


def probed(positions, tokens, dim=8):
    """Without a position: what a token is, ``[probes, 2, 1, dim]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(128, 2, 1, dim, generator=generator)[tokens]


@pytest.mark.parametrize("offset", [0, 6])
@pytest.mark.parametrize("part", [0, 1])
def test_the_rotated_part_is_found_wherever_it_stands(offset, part):
    """Leading, trailing (MLA, expanded per head), or cached as the values (MLA, latents)."""
    expected = Rotation("half", "half", 8, offset, part)

    def kv_at(positions, tokens):
        kv = [probed(positions, tokens, 14), probed(positions, tokens, 14)]
        angles = frequencies(*cos_sin(0, positions), "half")
        angles = tuple(each[:, None, None] for each in angles)
        kv[part] = rotate(kv[part], angles, "half", offset)
        return [tuple(kv)]

    assert calibrate(kv_at, cos_sin) == [expected]


def test_a_rotation_nobody_knows_is_refused():
    def kv_at(positions, tokens):
        keys = probed(positions, tokens)
        return [(keys * (1 + positions[:, None, None, None]), keys)]

    with pytest.raises(PICacheError, match="layer 0: no known rotary layout"):
        calibrate(kv_at, cos_sin)


def test_values_that_follow_the_position_are_refused():
    def kv_at(positions, tokens):
        keys = probed(positions, tokens)
        angles = frequencies(*cos_sin(0, positions), "half")
        turned = rotate(keys, tuple(each[:, None, None] for each in angles), "half")
        return [(turned, keys + positions[:, None, None, None])]

    with pytest.raises(PICacheError, match="keys and values move"):
        calibrate(kv_at, cos_sin)


def test_keys_that_do_not_move_are_left_alone():
    def kv_at(positions, tokens):
        return [(probed(positions, tokens),) * 2]

    assert calibrate(kv_at, cos_sin) == [None]


def angles_at(positions, scale=1.0):
    turns = positions[:, None].double() * torch.tensor([1.0, 0.3, 0.05]).double()
    return (turns.cos() * scale).float(), (turns.sin() * scale).float()


@settings(deadline=None)
@given(
    p=st.integers(0, 4000),
    q=st.integers(0, 4000),
    r=st.integers(0, 4000),
    layout=st.sampled_from(["half", "interleaved"]),
    scale=st.sampled_from([1.0, 1.14]),
)
def test_moves_compose(p, q, r, layout, scale):
    """p to q to r is p to r, there and back is the identity, and a move equals a fresh rotation."""
    keys = torch.randn(1, 2, 4, 8)
    at_p, at_q, at_r = (angles_at(torch.arange(x, x + 4), scale) for x in (p, q, r))
    moved = rotate(keys, difference(at_p, at_q), layout)
    twice = rotate(moved, difference(at_q, at_r), layout)
    assert_close("p-q-r", twice, rotate(keys, difference(at_p, at_r), layout))
    assert_close("back", rotate(moved, difference(at_q, at_p), layout), keys)
    rotated = rotate(keys, at_p, layout)
    fresh = rotate(keys, at_q, layout)
    assert_close("fresh", rotate(rotated, difference(at_p, at_q), layout), fresh)
    assert torch.equal(moved[..., 6:], keys[..., 6:])


def test_the_text_of_a_rotation_in_chunk_keys_does_not_change():
    """Chunks that an earlier release wrote to disk are found under the same keys."""
    rotation = Rotation("half", "interleaved", 8, offset=4, part=1)
    text = "Rotation(source='half', layout='interleaved', rotary_dim=8, offset=4, part=1)"
    assert str(rotation) == text
    pic = PIC(tiny_model("llama"))
    llama = "Rotation(source='half', layout='half', rotary_dim=16, offset=0, part=0)"
    assert pic.hf.header("", "exact").rope == repr([llama])
