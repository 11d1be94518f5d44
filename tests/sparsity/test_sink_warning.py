"""A policy that may evict the sinks of a model says so once; without sinks nobody says anything."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

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
from sparsity.policies.base import Policy
from sparsity.policies.evicting import Evicting
from sparsity.retention import layer as retention_layer
from tests.helpers import random_ids, tiny_model
from tests.sparsity.helpers import padded_inputs

LOSING = [
    RaaS(16, page_size=4, pin_prompt=False),
    Random(16, recent=2, pin_prompt=False),
    StreamingLLM(16, sinks=0),
    LazyEviction(16, evict_every=4, sinks=0),
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


def test_the_share_is_a_mean_over_layers_and_heads(sinking):
    """Query heads that point elsewhere, in one layer, take their part of the share away."""
    queries = sinking.model.layers[2].self_attn.q_proj
    queries._forward_hooks.clear()
    queries.register_forward_hook(pointing(slice(None), slice(None)))
    heads = sinking.config.num_attention_heads
    queries.register_forward_hook(lambda module, given, out: silenced(out, heads, 1))
    layers = len(sinking.model.layers)
    (message,) = said(sinking, LOSING[1], random_ids(64, 1))
    share = 1 - (1 - 4 / 64) / heads / layers  # a query of zeros attends to all tokens alike
    assert f"({share:.0%} of" in message
    assert f"{share:.0%}" != "100%"


def silenced(out, heads, count):
    out = out.unflatten(-1, (heads, -1)).clone()
    out[..., :count, :] = 0
    return out.flatten(2)


@dataclass(frozen=True)
class PerHead(Evicting):
    """A policy of one's own with a field that has no hash."""

    weights: list | None = None

    def worth(self, pages):
        return pages.start.float()


@dataclass(frozen=True)
class Newest(Policy):
    """A policy of one's own that offers neither sinks nor a pinned prompt."""

    budget: int = 16
    page_size = 1
    dense_layers = 0
    pin_prompt = False
    evicts = True

    def priority(self, pages):
        return pages.start.float()


@pytest.mark.parametrize(
    ("policy", "remedy"),
    [
        (PerHead(16, weights=[1.0, 2.0]), "Use PerHead(..., sinks=4)"),
        (Newest(), "Use a Newest whose `priority` is infinite for pages with `start` below 4"),
        (LOSING[-1], "Use Random(..., sinks=4)"),
    ],
    ids=["without a hash", "without sinks", "of two only one"],
)
def test_the_remedy_is_one_that_the_policy_has(sinking, policy, remedy):
    (message,) = said(sinking, policy, random_ids(80, 1))
    assert remedy in message
    assert not said(sinking, policy, random_ids(80, 1))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("budget", [64, 128])
def test_a_prompt_in_small_chunks_says_so_where_all_of_it_is_held(sinking, budget, static):
    """The sinks are in the first chunk; the second one is measured while nothing is evicted."""
    cache = SparseCache(
        sinking, RaaS(budget, page_size=4, pin_prompt=False), static=static, max_tokens=200
    )
    first, second = random_ids(80, 1).split(48, 1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        sinking(first, past_key_values=cache)
    without_sinks(sinking)
    with pytest.warns(UserWarning, match="attention sinks"), torch.no_grad():
        sinking(second, past_key_values=cache)


def without_sinks(model):
    """From now on no new key is pointed at."""
    for layer in model.model.layers:
        layer.self_attn.k_proj._forward_hooks.clear()
        layer.self_attn.k_proj.register_forward_hook(lambda module, given, out: out * 0)


def test_small_chunks_that_evict_before_64_tokens_say_nothing(sinking):
    """The limit: by then the first tokens may be gone, and with them what could be measured."""
    cache = SparseCache(sinking, LOSING[0])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for chunk in random_ids(192, 1).split(48, 1):
            sinking(chunk, past_key_values=cache)
            without_sinks(sinking)
    assert cache.report().tokens_kept == (16,) * 4


@pytest.mark.parametrize("new", [1, 10])
def test_a_past_counts_as_the_prompt(sinking, new):
    past, ids = DynamicCache(config=sinking.config), random_ids(80 + new, 1)
    with torch.no_grad():
        sinking(ids[:, :80], past_key_values=past)
    without_sinks(sinking)
    cache = SparseCache(sinking, LOSING[0], past=past)
    with pytest.warns(UserWarning, match="attention sinks"), torch.no_grad():
        sinking(ids[:, 80:], past_key_values=cache)


def test_a_model_is_measured_once(sinking, monkeypatch):
    """Of a model without sinks too; a later policy is told what is known as its cache is made."""
    calls = []
    measured = retention_layer.on_first
    monkeypatch.setattr(
        retention_layer, "on_first", lambda *given: calls.append(1) or measured(*given)
    )
    plain = tiny_model("llama")
    for policy in LOSING:
        assert not said(plain, policy, random_ids(80, 1))
    assert len(calls) == len(plain.model.layers)
    assert said(sinking, LOSING[0], random_ids(80, 1))
    with pytest.warns(UserWarning, match="attention sinks"):
        SparseCache(sinking, LOSING[1])
    assert len(calls) == 2 * len(plain.model.layers)


def test_no_step_of_decoding_measures(sinking, monkeypatch):
    monkeypatch.setattr(retention_layer, "on_first", lambda *given: pytest.fail("measured"))
    cache, ids = SparseCache(sinking, RaaS(128, page_size=4, pin_prompt=False)), random_ids(80, 1)
    with torch.no_grad():
        sinking(ids[:, :40], past_key_values=cache)
        for token in ids[:, 40:].split(1, 1):
            sinking(token, past_key_values=cache)


def test_the_warning_is_of_the_callers_line(sinking):
    with pytest.warns(UserWarning, match="attention sinks") as behind_the_prompt:
        sinking.generate(
            random_ids(80, 1),
            past_key_values=SparseCache(sinking, LOSING[0]),
            max_new_tokens=2,
        )
    with pytest.warns(UserWarning, match="attention sinks") as as_it_is_made:
        SparseCache(sinking, LOSING[1])
    for (one,) in (behind_the_prompt, as_it_is_made):
        assert one.filename == __file__
