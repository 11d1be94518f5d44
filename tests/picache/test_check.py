"""The self-check can fail: each thing linking rests on, broken on purpose, is refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import picache.hf.attention_switch
from picache import PIC, PICacheError
from picache.hf.model import HFModel
from picache.hf.self_check import check
from picache.hf.sparse_pass import ScatterMask
from tests.helpers import CONFIGS, tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASK = ScatterMask.__call__


def causal_only(self, query, key):
    return key[None] <= query[:, None]


def aligned_to_the_end(self, query, key):
    rows = torch.arange(len(query), device=query.device) + len(key) - len(query)
    return MASK(self, rows, key)


def one_key_late(self, query, key):
    return MASK(self, query, key) & ((key[None] != query[:, None]) | (query[:, None] == 0))


def everything(self, query, key):
    return torch.ones(len(query), len(key), dtype=torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_right_model_passes(family, dtype):
    PIC(tiny_model(family, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [aligned_to_the_end, one_key_late, everything])
def test_a_wrong_mask_is_refused(wrong, dtype, monkeypatch):
    model = tiny_model("llama", dtype=dtype)
    monkeypatch.setattr(ScatterMask, "__call__", wrong)
    with pytest.raises(PICacheError, match=r"self-check.*layer 1: keys of tokens recomputed"):
        PIC(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [8, 16, 40])
def test_a_mask_without_the_window_is_refused(window, dtype, monkeypatch):
    model = tiny_model("mistral_sliding", dtype=dtype, sliding_window=window)
    PIC(model)
    monkeypatch.setattr(ScatterMask, "__call__", causal_only)
    with pytest.raises(PICacheError, match=r"self-check.*scattered positions"):
        PIC(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("wrong", [dict(pairing="interleaved"), dict(source="interleaved"), None])
def test_a_wrong_rotation_is_refused(layer, wrong, dtype):
    model = HFModel(tiny_model("llama", dtype=dtype))
    model.rotations[layer] = wrong and replace(model.rotations[layer], **wrong)
    with pytest.raises(PICacheError, match=rf"layer {layer}: keys of a chunk moved"):
        check(model)


def test_an_attention_that_ignores_what_is_registered_is_refused(monkeypatch):
    """Scores that are changed behind the interface: here a bias only the own attention knows."""
    right = picache.hf.attention_switch.attend_scattered

    def other(module, query, key, value, mask, **kwargs):
        return right(module, query, key, value, mask, **{**kwargs, "scaling": 0.1})

    monkeypatch.setattr(picache.hf.attention_switch, "attend_scattered", other)
    with pytest.raises(PICacheError, match="layer 1: keys of tokens recomputed"):
        PIC(tiny_model("llama"))


class Shift(nn.Module):
    """A state outside the cache: every token takes something over from the one before."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        before = torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return self.inner(hidden + before)


def test_a_state_outside_the_cache_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp = Shift(model.model.layers[1].mlp).eval()
    with pytest.raises(PICacheError, match="layer 2: keys of tokens recomputed at scattered"):
        PIC(model)


def test_a_last_layer_that_is_wrong_shows_in_the_logits():
    model = tiny_model("llama")
    model.model.layers[3].mlp = Shift(model.model.layers[3].mlp).eval()
    with pytest.raises(PICacheError, match="logits after tokens recomputed at scattered"):
        PIC(model)


def test_a_model_of_very_few_positions_is_checked_within_them():
    PIC(tiny_model("llama", max_position_embeddings=10))
