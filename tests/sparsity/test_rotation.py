"""The rotation of a model: found on the model itself, or refused."""

import copy
import gc
import sys
import weakref

import pytest
import torch

import sparsity
from sparsity import RaaS, SnapKV, SparseCache, SparsityError, StreamingLLM, Then
from sparsity.policies.base import Needs
from sparsity.retention.rotation import Rotation
from tests.helpers import assert_close, random_ids
from tests.sparsity.helpers import left_as_it_was
from tests.sparsity.naive_positions import ROTATED, angles, build

REFUSED = {
    "Llama (dynamic NTK)": "other angles in a long text",
    "Phi-3 (longrope)": "other angles in a long text",
    "HunYuan dense": "no known rotation",
    "NanoChat": "no known rotation",
    "Cohere 2": "change nothing",
    "GPT-2": "no rotary embedding module",
}


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_a_move_is_a_difference_of_rotations_and_leaves_the_rest(pairing):
    move = Rotation(angles, pairing)
    keys = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = [
        torch.randint(0, 99, (2, 3, 5), generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    ]
    there = move(keys, *at)
    assert_close("back", move(there, *reversed(at)), keys, 1e-12)
    assert torch.equal(there[..., 6:], keys[..., 6:])
    assert_close("length", there.norm(dim=-1), keys.norm(dim=-1), 1e-12)
    first, second = (0, 3) if pairing == "half" else (0, 1)  # the pair with frequency 1
    by = at[1][0, 0, 0] - at[0][0, 0, 0]
    a, b = keys[0, 0, 0, first], keys[0, 0, 0, second]
    assert_close("by hand", there[0, 0, 0, first], a * by.cos() - b * by.sin(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ROTATED)
def test_a_rotation_is_found_on_the_model_itself(family, dtype):
    model = build(family).to(dtype)
    moves = [x.move for x in SparseCache(model, StreamingLLM(8)).retentions.values()]
    sparsity.detach(model)
    found = {(m.pairing, m.angles.written) for m in moves if isinstance(m, Rotation)}
    assert found == {ROTATED[family]}
    assert sum(not isinstance(m, Rotation) for m in moves) == (family == "SmolLM3")


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_without_a_proven_rotation_is_refused_and_left_as_it_was(family):
    model = build(family)
    with (
        left_as_it_was(model),
        pytest.raises(SparsityError, match=rf"{REFUSED[family]}.*positions='absolute'"),
    ):
        SparseCache(model, StreamingLLM(8))
    cache = SparseCache(model, StreamingLLM(8, positions="absolute"))
    ids = random_ids(12, 1).clamp(max=117)
    model.generate(ids, past_key_values=cache, max_new_tokens=4)
    assert cache.report().tokens_kept[-1] == 8


def test_positions_of_several_axes_are_refused():
    model = build("Qwen2-VL (text)")
    ids, decoder = random_ids(5, 1), model.get_decoder()
    positions = torch.arange(5).expand(3, 1, -1)
    older = "does not take positions"  # of one axis, in earlier releases
    newer = r"\(3, 1, 5\): where positions have several axes"

    def forward(policy):
        cache = SparseCache(model, policy)
        decoder(input_ids=ids, position_ids=positions, past_key_values=cache)
        return cache

    with pytest.raises(SparsityError, match=rf"({older}|{newer}).*positions='absolute'"):
        forward(StreamingLLM(8))
    assert forward(StreamingLLM(8, positions="absolute")).get_seq_length() == 5


def test_combinations_that_cannot_be_right():
    with pytest.raises(SparsityError, match="holes of its own"):
        Then(SnapKV(8, window=2), StreamingLLM(16))
    Then(SnapKV(8, window=2), StreamingLLM(16, positions="absolute"))
    with pytest.raises(SparsityError, match="cannot need both"):
        Needs(moved=4, attention="newest")
    with pytest.raises(SparsityError, match="'cache' or 'absolute'"):
        StreamingLLM(8, positions="relative")


def test_only_who_moves_keys_looks_at_the_model(llama):
    """No forward for other policies; one, of one token a row, for positions inside the cache."""
    calls = []
    handle = llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    for policy in (RaaS(64), StreamingLLM(8, positions="absolute"), StreamingLLM(8, sinks=0)):
        SparseCache(llama, policy)
    assert calls == []
    fork = copy.deepcopy(SparseCache(llama, StreamingLLM(8)))
    handle.remove()
    assert calls == [(10, 1)]
    assert fork.get_seq_length() == 0


@pytest.fixture
def forwards(llama, monkeypatch):
    """A model, and the forwards of its decoder that there were."""
    seen, forward = [], llama.model.forward

    def counted(*args, **kwargs):
        seen.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(llama.model, "forward", counted)
    return llama, seen


def moves_of(model):
    return [x.move for x in SparseCache(model, StreamingLLM(8)).retentions.values()]


def test_the_rotation_is_looked_for_once(forwards):
    """A forward for the cache of each request would be lost."""
    model, seen = forwards
    first = moves_of(model)
    sparsity.detach(model)
    assert moves_of(model) == first
    assert len(seen) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
        lambda model: setattr(
            model.model.rotary_emb, "inv_freq", model.model.rotary_emb.inv_freq * 0.5
        ),
        lambda model: setattr(model.model, "rotary_emb", copy.deepcopy(model.model.rotary_emb)),
        lambda model: setattr(model.model.rotary_emb, "attention_scaling", 1.5),
        lambda model: model.to(torch.bfloat16),
        lambda model: setattr(model.config, "rope_theta", 3e5),
        lambda model: setattr(
            model.model.layers[0].self_attn, "forward", model.model.layers[0].self_attn.forward
        ),
    ],
    ids="in place|another buffer|another module|a number|a dtype|the config|a forward".split("|"),
)
def test_a_model_that_was_changed_is_looked_at_again(forwards, change):
    model, seen = forwards
    moves_of(model)
    change(model)
    moves = moves_of(model)
    assert len(seen) == 2
    assert {move.angles.module for move in moves} == {model.model.rotary_emb}


def test_another_rotary_function_is_looked_for_again(forwards, monkeypatch):
    model, seen = forwards
    before = moves_of(model)
    modeling = sys.modules[type(model).__module__]
    plain = modeling.apply_rotary_pos_emb

    def interleaved(q, k, cos, sin):
        def halves(x):
            return torch.cat([x[..., ::2], x[..., 1::2]], -1)

        def pairs(x):
            return torch.stack(x.chunk(2, -1), -1).flatten(-2)

        return tuple(map(pairs, plain(halves(q), halves(k), cos, sin)))

    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", interleaved)
    after = moves_of(model)
    assert {m.pairing for m in before} == {"half"}
    assert {m.pairing for m in after} == {"interleaved"}
    assert len(seen) == 2


def test_a_configuration_that_json_cannot_write_is_no_error(forwards):
    model, seen = forwards
    model.config.of_mine = {1, 2}
    model.config.another = object()
    assert moves_of(model) == moves_of(model)
    assert len(seen) == 1


def test_what_was_proved_of_a_model_goes_with_it():
    model = build("Qwen3")
    moves_of(model)
    sparsity.detach(model)
    decoder = weakref.ref(model.get_decoder())
    del model
    gc.collect()
    assert decoder() is None
