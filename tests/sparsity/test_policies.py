"""Configuration: the papers' defaults, budgets by layer, what policies declare."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from sparsity import (
    H2O,
    RKV,
    TOVA,
    LazyEviction,
    PyramidKV,
    QuestRaaS,
    RaaS,
    SnapKV,
    SparseCache,
    SparsityError,
    Then,
    VaSE,
)
from sparsity.policies.base import Needs
from tests.helpers import random_ids
from tests.sparsity.zoo import AMPLE, SMALL, TIGHT

DEFAULTS = [
    (RaaS(1024), dict(page_size=16, threshold=1e-4, pin_prompt=True, score="bound", attend="all")),
    (QuestRaaS(1024), dict(page_size=16, prompt_budget=1024, pin_prompt=True, pins_count=False)),
    (H2O(1024), dict(recent_kept=512, normalise="none", sinks=0, pin_prompt=False)),
    (TOVA(1024), dict(shared_heads=True, recent_kept=0, sinks=0, group="mean")),
    (SnapKV(1024), dict(window=64, recent_kept=64, kernel=5, pooling="mean", evict_every=None)),
    (PyramidKV(1024), dict(window=64, kernel=5, beta=20, evict_every=None)),
    (RKV(1024), dict(evict_every=128, window=8, recent_kept=8, mix=0.1, kernel=7)),
    (LazyEviction(1024), dict(evict_every=175, recent_kept=175, alpha=1e-4, sinks=4, ties="score")),
    (VaSE(1024), dict(sinks=4, window=64, recent_kept=64, large_kept=256, kernel=5)),
]


@pytest.mark.parametrize(("policy", "expected"), DEFAULTS, ids=lambda x: type(x).__name__)
def test_defaults_are_the_papers(policy, expected):
    assert {name: getattr(policy, name) for name in expected} == expected


@pytest.mark.parametrize("layers", [1, 2, 5, 32])
def test_the_pyramid_is_a_line_around_the_budget(layers):
    policy = PyramidKV(264, window=64, beta=20)
    budgets = [policy.at_layer(i, layers).budget for i in range(layers)]
    assert budgets[0] == 64 + 400 - 10
    if layers > 1:
        assert budgets[-1] == 64 + 10
        assert abs(sum(budgets) / layers - 264) <= 1
        steps = [above - below for above, below in itertools.pairwise(budgets)]
        assert max(steps) - min(steps) <= 1
    assert PyramidKV(64, window=3, beta=1).at_layer(layers, 2 * layers + 1).budget == 64


def test_every_policy_is_in_every_list():
    kinds = {type(policy) for policy in AMPLE}
    assert kinds == {type(policy) for policy in TIGHT} == {type(policy) for policy in SMALL}
    assert len(kinds) == 15


def test_two_policies_in_turn_say_what_each_says():
    both = Then(SnapKV(32, window=8, recent=1, page_size=16), RaaS(64))
    assert both.needs == Needs(summaries=True, window=8)
    assert (both.budget, both.page_size, both.pages_kept, both.pages_held) == (64, 16, 2, 4)
    assert both.pins_kept
    assert not both.pin_prompt
    pyramid = Then(PyramidKV(10, window=2, beta=4), H2O(20, pin_prompt=True))
    budgets = [pyramid.at_layer(i, 3).prompt.budget for i in range(3)]
    assert budgets == [16, 10, 4]
    assert {pyramid.at_layer(i, 3).decode.budget for i in range(3)} == {20}
    with pytest.raises(SparsityError, match=r"leaves 64 tokens, and RaaS.* has room for 48"):
        Then(SnapKV(64, window=8, page_size=16), RaaS(64))
    Then(SnapKV(64, window=8, page_size=16), RaaS(64, pin_prompt=False))


def test_policies_are_values_that_declare_what_they_need():
    for policy in (*AMPLE, *TIGHT, *SMALL):
        assert hash(policy) == hash(policy)
        assert isinstance(policy.needs, Needs)
    assert RaaS(64).needs == Needs(summaries=True)
    assert RaaS(64, score="exact").needs == Needs(tokens=True)
    assert H2O(64).needs == Needs(attention="all", sums=1)


@pytest.mark.parametrize(
    "policy", [H2O(64), VaSE(256), RKV(64), SnapKV(128), PyramidKV(256)], ids=str
)
def test_another_budget_is_the_policy_made_with_it(policy):
    """What the user left out follows the budget, also through `dataclasses.replace`."""
    assert dataclasses.replace(policy, budget=1024) == type(policy)(1024)
    assert dataclasses.replace(RaaS(64), top_ratio=0.5) == RaaS(64, top_ratio=0.5)


def test_what_cannot_be_offered_is_no_argument():
    with pytest.raises(TypeError, match="pin_prompt"):
        PyramidKV(256, pin_prompt=True)
    with pytest.raises(SparsityError, match=r"QuestRaaS\(evict_every=None\)"):
        QuestRaaS(64, evict_every=None)


def test_the_policy_that_the_docs_write_runs(shallow):
    """From public names alone: the tokens whose keys are longest, and the newest."""
    page = (Path(__file__).parents[2] / "docs/sparsity.md").read_text()
    code = page.split("## A policy of one's own\n\n```python\n")[1].split("```")[0]
    names = {"__name__": "a_policy"}
    exec(code, names)
    cache = SparseCache(shallow, names["LargeKeys"](24))
    shallow.generate(random_ids(13, 1), past_key_values=cache, max_new_tokens=30, do_sample=False)
    assert cache.report().tokens_kept == (24, 24)
    pool, newest = cache.retentions[0].pool, cache.get_seq_length() - 1
    held = set(pool.slots[0, 0].tolist())
    assert held >= set(range(newest - 15, newest + 1))
