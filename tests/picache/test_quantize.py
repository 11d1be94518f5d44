"""Stored in 8 bits: the error stays under the bound that the codec states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from picache import PICacheError
from picache.store.quantize import PARTS, decode, encode

shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 7))
magnitudes = st.sampled_from([0.0, 1e-38, 1e-6, 1.0, 37.5, 1e4, 1e30])


@st.composite
def layers(draw):
    heads, tokens, size = draw(shapes)
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))

    def tensor():
        x = torch.randn(1, heads, tokens, size, generator=made) * draw(magnitudes)
        x[..., 0] *= draw(st.sampled_from([1.0, 1000.0]))  # an outlier channel, as keys have
        return x.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else x.to(dtype)

    return tensor(), tensor()


def largest(x, over):
    return x.double().abs().amax(over, keepdim=True)


def rounding(x):
    """What giving back the dtype may add."""
    return x.double().abs() * torch.finfo(x.dtype).eps + torch.finfo(x.dtype).smallest_normal


@settings(max_examples=300, deadline=None)
@given(layers())
def test_int8_is_off_by_half_a_step_of_its_scale(kv):
    decoded = decode(encode(kv, "int8"), kv[0].dtype)
    for x, y, over in zip(kv, decoded, (2, 3), strict=True):
        assert y.dtype == x.dtype
        bound = largest(x, over) / 127 / 2 * 1.0001 + rounding(x)
        assert ((x.double() - y.double()).abs() <= bound).all()


@settings(max_examples=300, deadline=None)
@given(layers())
def test_fp8_is_off_by_a_sixteenth_or_the_last_bit_of_its_scale(kv):
    decoded = decode(encode(kv, "fp8"), kv[0].dtype)
    for x, y in zip(kv, decoded, strict=True):
        assert y.dtype == x.dtype
        assert y.isfinite().all()
        floor = largest(x, (2, 3)) / 448 * 2**-10
        bound = torch.maximum(x.double().abs() / 16, floor) * 1.0001 + rounding(x)
        assert ((x.double() - y.double()).abs() <= bound).all()


def test_one_head_token_or_channel_does_not_spoil_another():
    keys = torch.full((1, 2, 4, 3), 0.5)
    keys[0, 0, :, 1] = 1e4
    values = torch.full((1, 2, 4, 3), 0.5)
    values[0, 0, 2] = 1e4
    decoded_keys, decoded_values = decode(encode((keys, values), "int8"), torch.float32)
    torch.testing.assert_close(decoded_keys, keys)
    torch.testing.assert_close(decoded_values, values)
    decoded_keys, _ = decode(encode((keys, values), "fp8"), torch.float32)
    torch.testing.assert_close(decoded_keys[0, 1], keys[0, 1])


@given(layers())
@settings(deadline=None, max_examples=50)
def test_exact_is_exact_and_parts_are_as_listed(kv):
    assert all(a is b for a, b in zip(decode(encode(kv, "exact"), kv[0].dtype), kv, strict=True))
    for storage, parts in PARTS.items():
        assert tuple(encode(kv, storage)) == parts


def test_an_unknown_storage_is_refused():
    with pytest.raises(PICacheError, match="storage must be one of exact, int8, fp8, got 'int3'"):
        encode((torch.zeros(1, 1, 1, 1),) * 2, "int3")
