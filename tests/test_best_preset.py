"""`picache.presets.best` names what docs/results/link_evidence.json says was best."""

import json
import sys
from pathlib import Path

import pytest

import picache
from picache import PICacheError, SharedPrefix
from picache.presets import best

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "experiments"))
import link_ways  # noqa: E402 - the examples are scripts, not a package

SYSTEM = "Read the passages."
CHOSEN = {
    (row["budget"], row["among"]): row["arm"]
    for row in json.loads((ROOT / "docs" / "results" / "link_evidence.json").read_text())["best"]
}
ARMS = link_ways.arms_of(link_ways.ways(), SYSTEM)
BUDGETS = sorted({budget for budget, _ in CHOSEN})


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_preset_is_what_was_chosen(budget):
    assert best(budget) == ARMS[CHOSEN[budget, "any, no system prompt"]]
    assert best(budget, SYSTEM) == ARMS[CHOSEN[budget, "any"]]


def test_between_two_budgets_the_smaller_ones_arm_is_given():
    assert best(0.149) == best(0.05)
    assert best(1) == best(BUDGETS[-1])
    assert best(0.01) == best(0)


def test_a_prefix_may_be_ids():
    for budget in BUDGETS:
        arm = best(budget, (1, 2, 3))
        assert arm == best(budget) or arm.sinks == SharedPrefix((1, 2, 3))


@pytest.mark.parametrize("budget", [-0.1, 1.1, float("nan"), "5 %", None, True])
def test_a_budget_that_is_no_share_is_refused(budget):
    with pytest.raises(PICacheError, match="from 0 to 1"):
        best(budget)


def test_a_prefix_that_is_none_is_refused():
    with pytest.raises(PICacheError, match="SharedPrefix needs a text"):
        best(0.05, 7)


def test_what_stood_there_before_warns():
    with pytest.warns(DeprecationWarning, match="arms has moved"):
        assert picache.presets.arms is picache.arms
    with pytest.warns(DeprecationWarning, match="Arm has moved"):
        assert picache.presets.Arm is picache.Arm
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        picache.presets.nothing  # noqa: B018
