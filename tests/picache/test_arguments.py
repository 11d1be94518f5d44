"""Numbers of any kind are taken where they are what is meant; what is none is refused by name."""

import numpy as np
import pytest
import torch

from picache import (
    A3,
    APE,
    PIC,
    CacheBlend,
    ChunkStore,
    Combined,
    DummySinks,
    LegoLink,
    OracleDeviation,
    PICacheError,
    ProphetKV,
    RandomRecompute,
)
from picache.arguments import real_number, whole_number
from picache.methods.presets import arms
from tests.helpers import random_ids, tiny_model

THREES = [
    3,
    3.0,
    np.int64(3),
    np.uint8(3),
    np.float32(3),
    np.array(3),
    torch.tensor(3),
    torch.tensor(3.0),
]
NO_NUMBERS = [True, np.True_, torch.tensor(True), "3", b"3", None, np.timedelta64(3, "s")]
SEVERAL = [np.array([3.0, 4.0]), torch.tensor([3.0, 4.0])]


@pytest.mark.parametrize("given", THREES, ids=repr)
def test_whole_numbers_of_any_kind(given):
    number = whole_number("a method needs one", given, least=1)
    assert number == 3
    assert type(number) is int


def test_large_floats_are_exact():
    assert whole_number("a store needs one", 1e4) == 10_000
    assert whole_number("a store needs one", 2.0**60) == 2**60


@pytest.mark.parametrize(
    "given", [*NO_NUMBERS, *SEVERAL, 1.5, np.inf, np.nan, torch.tensor(1.5), 0, -1.0], ids=repr
)
def test_what_is_no_whole_number_is_named(given):
    with pytest.raises(PICacheError, match=r"a method needs one, got "):
        whole_number("a method needs one", given, least=1)


@pytest.mark.parametrize("given", [*NO_NUMBERS, *SEVERAL, np.nan, 1.01, -0.01], ids=repr)
def test_what_is_no_ratio_is_named(given):
    with pytest.raises(PICacheError, match=r"a ratio, got "):
        real_number("a ratio", given, lambda share: 0 <= share <= 1)


@pytest.mark.parametrize("given", THREES, ids=repr)
def test_methods_sinks_and_presets_are_those_of_the_int(given):
    for made, expected in [
        (LegoLink(given), LegoLink(3)),
        (RandomRecompute(given, seed=given), RandomRecompute(3, seed=3)),
        (DummySinks(given, token=given), DummySinks(3, token=3)),
        (CacheBlend(check_layers=(given, 4)), CacheBlend(check_layers=(3, 4))),
        (arms(k=given), arms(k=3)),
    ]:
        assert made == expected
        assert repr(made) == repr(expected)


@pytest.mark.parametrize("given", [0.25, np.float32(0.25), np.float64(0.25), torch.tensor(0.25)])
def test_ratios_are_those_of_the_float(given):
    for made, expected in [
        (CacheBlend(given), CacheBlend(0.25)),
        (CacheBlend.repo(given), CacheBlend.repo(0.25)),
        (A3(given), A3(0.25)),
        (ProphetKV(given), ProphetKV(0.25)),
        (OracleDeviation(given), OracleDeviation(0.25)),
        (RandomRecompute(ratio=given), RandomRecompute(ratio=0.25)),
        (Combined((LegoLink(4),), given), Combined((LegoLink(4),), 0.25)),
        (APE(given, given), APE(0.25, 0.25)),
        (arms(ratio=given), arms(ratio=0.25)),
    ]:
        assert made == expected
        assert repr(made) == repr(expected)


@pytest.mark.parametrize("bound", [1e4, np.int64(10_000), torch.tensor(10_000), 10_000], ids=repr)
def test_bounds_of_a_store_are_bytes_of_any_kind(bound, tmp_path):
    store = ChunkStore(device_bytes=bound, host_bytes=bound, path=tmp_path, disk_bytes=bound)
    budgets = [tier.budget for tier in store.stats().tiers]
    assert budgets == [10_000] * 3
    assert [type(budget) for budget in budgets] == [int] * 3


@pytest.mark.parametrize("name", ["device_bytes", "host_bytes", "disk_bytes"])
@pytest.mark.parametrize("bound", ["1GB", True, 0.5, float("nan"), 0, -3, (1,)], ids=repr)
def test_a_bound_that_is_no_number_of_bytes_is_named(name, bound, tmp_path):
    with pytest.raises(
        PICacheError, match=rf"{name} must be positive, got .*: give a number of bytes"
    ):
        ChunkStore(path=tmp_path, **{name: bound})


def test_what_pic_is_given_is_a_number_too():
    model = tiny_model("llama")
    assert PIC(model, flops_per_byte=np.int64(25)).flops_per_byte == 25
    for bad in ("25", float("nan"), -1, True):
        with pytest.raises(PICacheError, match=r"flops_per_byte must be at least 0 or None, got"):
            PIC(model, flops_per_byte=bad)


def test_dummies_by_a_numpy_count_link_as_by_an_int():
    model, documents = tiny_model("llama"), [random_ids(n, seed=n) for n in (5, 9)]
    logits = []
    for count in (2, np.int64(2)):
        pic = PIC(model, sinks=DummySinks(count))
        logits.append(pic.link([pic.compile(d) for d in documents], random_ids(3)).logits)
    assert torch.equal(*logits)
