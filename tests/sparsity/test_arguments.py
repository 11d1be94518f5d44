"""Numbers of any kind are taken; what is none is refused by its name."""

from dataclasses import fields
from fractions import Fraction

import numpy as np
import pytest
import torch

import sparsity
from sparsity import H2O, Needs, RaaS, SnapKV, SparsityError, Then, milestone_map, record, replay
from sparsity.arguments import share, whole_number
from sparsity.recorded.milestones import Thresholds
from tests.helpers import random_ids, tiny_model

KINDS = [
    int, float, np.int64, np.int32, np.uint16, np.float32, np.float64, np.array, torch.tensor,
    lambda n: torch.tensor(float(n)), Fraction,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_of_any_kind(kind):
    number = whole_number("budget", kind(48), least=1)
    assert number == 48
    assert type(number) is int


def test_large_floats_are_exact():
    assert whole_number("budget", 1e4) == 10_000
    assert whole_number("budget", 2.0**60) == 2**60


@pytest.mark.parametrize(
    "given",
    [True, np.True_, torch.tensor(True), "3", b"3", None, 1.5, np.inf, -np.inf, np.nan, 3j,
     np.array([3.0]), torch.tensor([3]), np.ma.masked, np.ma.array(3, mask=True),
     np.timedelta64(3, "s"), np.str_("3"), 0, -1.0],
)  # fmt: skip
def test_what_is_no_whole_number_is_named(given):
    with pytest.raises(
        SparsityError, match=r"(?s)budget=.*: expected a whole number of at least 1"
    ):
        whole_number("budget", given, least=1)


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, torch.tensor, Fraction])
def test_shares_of_any_kind(kind):
    assert share("alpha", kind(0.25)) == 0.25
    assert type(share("alpha", kind(0.25))) is float


@pytest.mark.parametrize(
    "given", ["0.1", None, True, np.nan, 1, -0.1, [0.1], np.array([0.1]), np.ma.masked]
)
def test_what_is_no_share_is_named(given):
    with pytest.raises(SparsityError, match=r"alpha=.*: expected a share in \[0, 1\)"):
        share("alpha", given)


POLICIES = {
    "Full": {"page_size": 8},
    "RaaS": {"budget": 64, "page_size": 8, "sinks": 1, "recent": 9, "dense_layers": 1,
            "evict_every": 8},
    "Quest": {"budget": 64, "page_size": 8, "dense_layers": 1},
    "QuestRaaS": {"budget": 64, "page_size": 8, "prompt_budget": 16},
    "H2O": {"budget": 64, "recent": 8},
    "Random": {"budget": 64, "recent": 8, "seed": 3},
    "StreamingLLM": {"budget": 64, "sinks": 2, "evict_every": 3},
    "SnapKV": {"budget": 64, "window": 8, "kernel": 3},
    "PyramidKV": {"budget": 64, "window": 8, "kernel": 3, "beta": 4},
    "RKV": {"budget": 64, "window": 4, "kernel": 3, "evict_every": 8},
    "LazyEviction": {"budget": 64, "evict_every": 8},
    "VaSE": {"budget": 64, "window": 8, "large": 7, "kernel": 3, "seed": 2, "evict_every": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("kind", [float, np.int64, torch.tensor])
def test_a_policy_is_the_one_made_with_ints(name, kind):
    policy, numbers = getattr(sparsity, name), POLICIES[name]
    expected = policy(**numbers)
    given = policy(**{name: kind(number) for name, number in numbers.items()})
    assert given == expected
    assert hash(given) == hash(expected)
    assert repr(given) == repr(expected)
    for field in numbers:
        assert type(getattr(given, field)) is int
        for wrong in ("8", 8.5, True):
            with pytest.raises(SparsityError, match=rf"{name}\({field}={wrong!r}\)"):
                policy(**numbers | {field: wrong})


@pytest.mark.parametrize(
    ("policy", "name"),
    [("RaaS", "alpha"), ("RaaS", "top_ratio"), ("RKV", "mix"), ("RKV", "threshold"),
     ("LazyEviction", "alpha")],
)  # fmt: skip
def test_a_share_of_a_policy(policy, name):
    made = getattr(sparsity, policy)
    expected = made(512, **{name: 0.25})
    for kind in (np.float32, np.float64, torch.tensor):
        assert repr(made(512, **{name: kind(0.25)})) == repr(expected)
    for wrong in ("0.25", True, float("nan")):
        with pytest.raises(SparsityError, match=rf"{policy}\({name}={wrong!r}\)"):
            made(512, **{name: wrong})


FLAGGED = ("RaaS", "H2O", "Random", "SnapKV", "TOVA", "RKV", "LazyEviction", "VaSE", "QuestRaaS")


@pytest.mark.parametrize("name", FLAGGED)
def test_a_flag_is_true_or_false_and_no_text(name):
    """The truth of "False" is True: it would be taken for the opposite of what was meant."""
    policy = getattr(sparsity, name)
    flags = [f.name for f in fields(policy) if f.init and f.name in ("pin_prompt", "shared_heads")]
    assert flags
    for flag in flags:
        for made in (np.bool_, np.array, torch.tensor):
            given = policy(512, **{flag: made(True)})
            assert given == policy(512, **{flag: True})
            assert getattr(given, flag) is True
            assert hash(given) == hash(policy(512, **{flag: True}))
        for wrong in ("False", 0, None, np.array([True])):
            with pytest.raises(SparsityError, match=rf"{name}\({flag}=.*: expected True or False"):
                policy(512, **{flag: wrong})


def test_what_a_policy_needs_is_checked():
    assert repr(Needs(window=4.0, sums=np.int64(1))) == repr(Needs(window=4, sums=1))
    for wrong in ({"window": "4"}, {"sums": -1}, {"moved": 1.5}, {"attention": "al"},
                  {"group": "median"}):  # fmt: skip
        with pytest.raises(SparsityError, match=rf"Needs\({next(iter(wrong))}=.*: expected"):
            Needs(**wrong)


def test_two_policies_made_with_floats():
    given = Then(SnapKV(128.0, page_size=16.0), RaaS(1e3 * 1.024))
    assert given == Then(SnapKV(128, page_size=16), RaaS(1024))


def test_thresholds_take_numbers_of_any_kind():
    expected = Thresholds(alpha=0.25, gap=16, local=4)
    assert repr(Thresholds(alpha=np.float32(0.25), gap=16.0, local=np.int64(4))) == repr(expected)
    for wrong in ({"alpha": "0.1"}, {"gap": 1.5}, {"local": True}):
        with pytest.raises(SparsityError, match=rf"Thresholds\({next(iter(wrong))}="):
            Thresholds(**wrong)


def test_recordings_take_whole_numbers_of_any_kind(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    model, ids = tiny_model("llama"), random_ids(9, 1)
    given = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False}
    trace = record(model, layers=np.array([1, 2]), max_bytes=1e9, **given)
    assert sorted(trace.layers) == [1, 2]
    expected = replay(trace, H2O(8), [1], page_size=4, top_tokens=8, progress=False)
    found = replay(
        trace, H2O(8), torch.tensor([1]), page_size=4.0, top_tokens=np.int64(8), progress=False
    )
    assert str(found) == str(expected)
    assert (trace.mass(np.int64(1), page_size=4.0) == trace.mass(1, 4)).all()
    monkeypatch.setenv("HOME", str(tmp_path))
    picture = "~/map.png"
    milestone_map(trace, torch.tensor(1), kv_head=1.0, page_size=np.int64(4), path=picture)
    assert (tmp_path / "map.png").exists()
    for wrong in ({"layers": 3}, {"layers": [1.5]}, {"layers": "12"}, {"max_bytes": "1e9"}):
        with pytest.raises(SparsityError, match=rf"{next(iter(wrong))}.*expected a"):
            record(model, **given | wrong)
    for wrong in ({"layers": 1}, {"page_size": 0}, {"top_tokens": "8"}, {"top_tokens": 0}):
        with pytest.raises(SparsityError, match=rf"{next(iter(wrong))}=.*expected a"):
            replay(trace, H2O(8), progress=False, **wrong)
    for wrong in ({"layer": "1"}, {"kv_head": 0.5}, {"page_size": 0}):
        with pytest.raises(SparsityError, match=rf"{next(iter(wrong))}=.*expected a"):
            milestone_map(**{"trace": trace, "layer": 1} | wrong)
