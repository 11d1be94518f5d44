"""Calibration proves a rotation or refuses; moved keys are the keys of the new place."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from picache import PIC, FullRecompute, PICacheError
from picache.rope import Rotation, calibrate, difference, rotate
from tests.helpers import FAMILIES, SHAPE, assert_close, random_ids, tiny_model

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
    found = pic._model.rotations[0]
    assert (found.layout, found.rotary_dim) == (rotation.layout, rotation.rotary_dim)
    documents = [random_ids(n, seed=n) for n in (9, 21, 14)]
    query = random_ids(5, seed=5)
    prompt = pic.link([pic.compile(d) for d in documents], query, FullRecompute())
    with torch.no_grad():
        expected = pic._model.model(torch.cat([*documents, query])[None]).logits[:, -1]
    assert_close("logits", prompt.logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_zero_keys_moved_are_the_keys_of_full_prefill(family):
    """Layer 0 does not depend on context, so this is the whole of re-rotation, end to end."""
    from picache import NaiveReuse

    pic = PIC(tiny_model(family), flops_per_byte=None)
    documents = [random_ids(n, seed=n) for n in (9, 21, 14)]
    query = random_ids(5, seed=5)
    linked = pic.link([pic.compile(d) for d in documents], query, NaiveReuse())
    full = pic._model.prefill(torch.cat([*documents, query])[None])
    layer = linked["past_key_values"].layers[0]
    assert_close("keys", layer.keys, full[0][0][:, :, :-1])
    assert_close("values", layer.values, full[0][1][:, :, :-1])


def test_moving_half_precision_keys_costs_one_rounding():
    keys = torch.randn(1, 2, 64, 8).bfloat16()
    old, new = (angles_at(torch.arange(s, s + 64), 1.0) for s in (0, 3000))
    turn = difference(old, new)
    error = rotate(keys, turn, "half").float() - rotate(keys.float(), turn, "half")
    assert error.abs().max() <= 2**-8 * keys.float().abs().max() * 2**0.5


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            transformers.LlamaConfig(
                **SHAPE, rope_parameters=dict(rope_type="dynamic", factor=4.0, **THETA)
            ),
            "rope_type='dynamic'",
        ),
        (
            transformers.LlamaConfig(
                **SHAPE,
                rope_parameters=dict(
                    rope_type="longrope",
                    short_factor=[1.0] * 8,
                    long_factor=[2.0] * 8,
                    original_max_position_embeddings=256,
                    factor=2.0,
                    **THETA,
                ),
            ),
            "rope_type='longrope'",
        ),
        (
            transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4),
            "no rotary embedding",
        ),
    ],
    ids=["dynamic", "longrope", "learned"],
)
def test_what_cannot_be_proven_is_refused(config, says):
    model = random_model(config)
    with pytest.raises(PICacheError, match=says):
        PIC(model)


def test_a_rotation_nobody_knows_is_refused():
    def keys_at(position, token):
        generator = torch.Generator().manual_seed(token)
        return [torch.randn(1, 2, 1, 8, generator=generator) * (1 + position)]

    def cos_sin(layer, positions):
        angles = positions[:, None].float() * torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2)
        return angles.cos(), angles.sin()

    with pytest.raises(PICacheError, match="layer 0: no known rotary layout"):
        calibrate(keys_at, cos_sin)


def test_keys_that_do_not_move_are_left_alone():
    keys = [torch.randn(1, 2, 1, 8)]
    assert calibrate(lambda position, token: keys, lambda layer, p: (p, p)) == [None]


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
