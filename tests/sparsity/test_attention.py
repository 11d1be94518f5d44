"""The dispatch against the reference, the reference against plain sums."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity.policies.hashed_random import mix
from sparsity.policies.scores import page_bounds
from sparsity.retention.attention import attend, attend_reference
from tests.helpers import assert_close


def plain(query, key, value, mask, scaling, softcap, sinks):
    """One query at a time, in float64."""
    batch, heads, width, _ = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(batch, width, heads, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for q in range(width):
                scores = key[b, h // group].double() @ query[b, h, q].double() * scaling
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                allowed = mask[b, h // group if mask.shape[1] > 1 else 0, q]
                weights = scores.exp() * allowed
                total = weights.sum() + (0 if sinks is None else sinks[h].double().exp())
                if total > 0:
                    out[b, q, h] = weights @ value[b, h // group].double() / total
    return out


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("mask_heads", [1, 2])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}, {"sinks": True}])
def test_attention(width, mask_heads, group, extra):
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 2 * group, width, 8, generator=g)
    key, value = torch.randn(2, 2, 7, 8, generator=g), torch.randn(2, 2, 7, 5, generator=g)
    mask = torch.rand(2, mask_heads, width, 7, generator=g) < 0.6
    mask[..., 0] = True
    if "sinks" in extra:
        extra = {"sinks": torch.randn(2 * group, generator=g)}
    expected = plain(query, key, value, mask, 0.3, extra.get("softcap"), extra.get("sinks"))
    for function in (attend, attend_reference):
        assert_close("masked", function(query, key, value, mask, 0.3, **extra), expected)
    causal = attend(query, key[:, :, :width], value[:, :, :width], None, 0.3, width > 1, **extra)
    lower = torch.ones(1, 1, width, width, dtype=torch.bool).tril()
    again = attend_reference(query, key[:, :, :width], value[:, :, :width], lower, 0.3, **extra)
    assert_close("causal", causal, again)


def test_a_query_with_nothing_to_attend_to_is_finite():
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 4, 8)
    mask = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    mask[:, :, 1] = False
    assert attend(query, key, key, mask).isfinite().all()
    assert (attend_reference(query, key, key, mask)[:, 1] == 0).all()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 9),
    size=st.floats(1e-3, 1e3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_bound_is_never_below_a_true_score(seed, tokens, size, dtype):
    g = torch.Generator().manual_seed(seed)
    keys = (torch.randn(1, 2, tokens, 6, generator=g) * size).to(dtype)
    query = torch.randn(1, 4, 6, generator=g).to(dtype)
    bounds = page_bounds(
        query, keys.amin(2, keepdim=True), keys.amax(2, keepdim=True), "max"
    ).double()
    scores = torch.einsum("bhgd,bhnd->bhgn", query.view(1, 2, 2, 6).double(), keys.double())
    slack = 1e-5 * query.double().abs().sum() * keys.double().abs().max()
    assert (bounds[..., 0] >= scores.amax((2, 3)) - slack).all()


def test_random_draws_are_uniform_and_the_hash_is_murmurs():
    draws = mix(torch.arange(20000)).double() / 2**32
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs((draws < 0.1).double().mean() - 0.1) < 0.01
    assert mix(1) == 0x514E28B7
    assert mix(torch.tensor(0xFFFFFFFF)) == 0x81F16F39
