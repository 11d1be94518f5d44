"""A policy that may evict the sinks of a model says so once; without sinks nobody says anything."""

import warnings

import pytest
import torch

from sparsity import (
    H2O,
    RKV,
    TOVA,
    LazyEviction,
    Quest,
    RaaS,
    Random,
    SnapKV,
    SparseCache,
    StreamingLLM,
    Then,
    detach,
)
from sparsity.hf import sink_warning
from tests.helpers import random_ids, tiny_model
from tests.sparsity.helpers import padded_inputs

LOSING = [
    RaaS(16, page_size=4, pin_prompt=False),
    Random(16, recent=2, pin_prompt=False),
    StreamingLLM(16, sinks=0),
    LazyEviction(16, evict_every=4),
    Then(SnapKV(8, window=4), Random(16, recent=2, pin_prompt=False)),
]
KEEPING = [
    RaaS(160, page_size=4),
    RaaS(16, page_size=4, pin_prompt=False, sinks=4),
    StreamingLLM(16),
    Quest(16, page_size=4),
    H2O(16),
    TOVA(16),
    SnapKV(16, window=4),
    RKV(16, evict_every=4),
]


@pytest.fixture
def sinking():
    """A model whose queries all point to the key of the first token, and at no other."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(pointing(slice(None), slice(None)))
        layer.self_attn.k_proj.register_forward_hook(pointing(slice(None), 0))
    yield model
    detach(model)


def pointing(rows, columns, dim=16):
    """A hook that puts the same vector for some tokens, and nothing for the others."""

    def hook(module, given, out):
        heads = torch.zeros_like(out).unflatten(-1, (-1, dim))
        heads[rows, columns, :, -1] = 8.0  # the pair that turns least with the position
        return heads.flatten(2)

    return hook


def said(model, policy, ids, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = SparseCache(model, policy)
        with torch.no_grad():
            model(ids, past_key_values=cache, **kwargs)
    return [str(one.message) for one in caught if "attention sinks" in str(one.message)]


@pytest.mark.parametrize("policy", LOSING, ids=str)
def test_a_policy_that_may_evict_sinks_says_so_once(sinking, policy):
    (message,) = said(sinking, policy, random_ids(80, 1))
    assert repr(policy) in message
    assert "sinks=4" in message
    assert not said(sinking, policy, random_ids(80, 1))
    assert not said(tiny_model("llama"), policy, random_ids(80, 1))  # which has no sinks


@pytest.mark.parametrize("policy", KEEPING, ids=str)
def test_a_policy_that_keeps_them_says_nothing(sinking, policy):
    assert not said(sinking, policy, random_ids(80, 1))


def test_a_short_prompt_says_nothing_and_the_next_one_is_asked(sinking):
    cache = SparseCache(sinking, LOSING[0])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        sinking(random_ids(20, 1), past_key_values=cache)
    cache.reset()
    with pytest.warns(UserWarning, match="attention sinks"), torch.no_grad():
        sinking(random_ids(80, 1), past_key_values=cache)


def test_padding_is_not_the_first_token(sinking):
    """Of a padded row the first real token counts, and of a short row nothing."""
    given = padded_inputs(100, 30, 60)
    for layer in sinking.model.layers:
        layer.self_attn.k_proj._forward_hooks.clear()
        layer.self_attn.k_proj.register_forward_hook(pointing(0, 30))
    (message,) = said(sinking, LOSING[0], given.pop("input_ids"), **given)
    assert "100%" in message


def test_the_share_is_a_mean_over_layers_and_heads(sinking, monkeypatch):
    seen = []
    monkeypatch.setattr(sink_warning, "fmean", lambda given: seen.append(list(given)) or 0.0)
    assert not said(sinking, LOSING[1], random_ids(64, 1))
    ((*shares,),) = seen
    assert len(shares) == 4
    assert all(share > 0.9 for share in shares)
