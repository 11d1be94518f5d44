"""`assert_within`: passed, failed and undecided, on the comparisons of all three packages."""

import importlib
import re

import numpy as np
import pytest

from picache import PICacheError
from picache.testing import assert_within


@pytest.fixture(params=["picache", "sparsity", "demand"])
def comparison(request):
    return importlib.import_module(f"{request.param}.comparison").Comparison


def shares(comparison, right, units=100):
    """Arms by the count of problems that they answer; the first `right` problems of each."""
    measured = {
        arm: {"accuracy": (np.arange(units) < n).astype(float), "nll": np.full(units, float(n))}
        for arm, n in right.items()
    }
    return comparison(measured, "problems", frozenset({"accuracy"}))


def test_all_of_the_interval_has_to_be_within(comparison):
    result = shares(comparison, {"full": 90, "near": 89, "better": 95})
    assert_within(result, "near", by=0.05)
    assert_within(result, "near", of="full", by=0.05)
    assert_within(result, "better", by=0.0)
    assert_within(result, "full", of="better", by=0.2)
    assert_within(result, "better", of="full", by=-0.005)  # surely better
    assert_within(result, "full", by=0.0)


def test_what_is_surely_worse_fails_with_the_interval_and_the_table(comparison):
    result = shares(comparison, {"full": 90, "poor": 50})
    with pytest.raises(AssertionError) as error:
        assert_within(result, "poor", by=0.05)
    text = str(error.value)
    interval = result.loss("poor", "accuracy")
    assert interval.estimate == pytest.approx(0.4)
    assert text.startswith(f"'poor' loses {interval} to 'full' in accuracy")
    assert "100 problems: more than 0.05" in text
    assert text.endswith(str(result))
    assert "undecided" not in text


def test_where_less_is_better_more_is_a_loss(comparison):
    result = shares(comparison, {"full": 1, "other": 3})
    assert_within(result, "other", by=2.0, metric="nll")
    assert_within(result, "full", of="other", by=-2.0, metric="nll")
    with pytest.raises(AssertionError, match=r"'other' loses 2 \[2, 2\].*more than 1.9"):
        assert_within(result, "other", by=1.9, metric="nll")


def test_an_interval_that_holds_the_bound_is_undecided(comparison):
    result = shares(comparison, {"full": 18, "arm": 17}, units=20)
    with pytest.raises(AssertionError) as error:
        assert_within(result, "arm", by=0.06)
    text = str(error.value)
    assert text.startswith("undecided: 'arm' loses 0.05 [")
    assert "which holds 0.06" in text
    assert text.endswith(str(result))
    # By hand: the upper half of the interval has to shrink from its length to 0.01.
    half = result.loss("arm", "accuracy").high - 0.05
    needed = 20 * (half / 0.01) ** 2
    said = int(re.search(r"about (\d+) problems would be enough", text)[1])
    assert needed <= said <= 1.1 * needed + 1


@pytest.mark.parametrize("bound", [0.0, 0.2])
def test_as_many_as_it_says_are_about_enough(comparison, bound):
    """Losses of mean .1 and spread 1: on either side of the bound, four times few decide."""
    draw = np.random.default_rng(3).normal(size=200_000)

    def result(units):
        losses = draw[:units] - draw[:units].mean() + 0.1  # the loss stays what it is
        return comparison({"full": {"nll": np.zeros(units)}, "arm": {"nll": losses}}, "texts")

    with pytest.raises(AssertionError, match="undecided") as error:
        assert_within(result(60), "arm", by=bound, metric="nll")
    said = int(re.search(r"about (\d+) texts would be enough", str(error.value))[1])
    assert 200 < said < 800  # (1.96 / .1)^2 = 384
    with pytest.raises(AssertionError, match="undecided"):
        assert_within(result(said // 3), "arm", by=bound, metric="nll")
    if bound > 0.1:
        assert_within(result(2 * said), "arm", by=bound, metric="nll")
    else:
        with pytest.raises(AssertionError, match=r"more than 0\n"):
            assert_within(result(2 * said), "arm", by=bound, metric="nll")


def test_no_number_decides_what_lies_on_the_bound(comparison):
    result = shares(comparison, {"full": 18, "arm": 17}, units=20)
    with pytest.raises(AssertionError, match="no number of problems would decide"):
        assert_within(result, "arm", by=0.05)


@pytest.mark.parametrize("right", [0, 1])
def test_one_problem_decides_nothing(comparison, right):
    result = shares(comparison, {"full": 1, "arm": right}, units=1)
    with pytest.raises(AssertionError, match=r"undecided.*one of the problems gives no interval"):
        assert_within(result, "arm")


def test_a_metric_without_numbers_is_refused_by_name(comparison):
    measured = {arm: {"accuracy": np.array([1.0, np.nan, 1.0])} for arm in ("full", "arm")}
    result = comparison(measured, "problems", frozenset({"accuracy"}))
    with pytest.raises(PICacheError, match=r"no 'accuracy' of 'arm'.*give answers"):
        assert_within(result, "arm")


def test_without_answers_there_is_no_accuracy(comparison):
    result = comparison({"full": {"kl": np.zeros(3)}, "arm": {"kl": np.ones(3)}}, "problems")
    with pytest.raises(PICacheError, match=r"takes problems with answers: .* another metric of kl"):
        assert_within(result, "arm")


def test_what_was_not_measured_is_refused_by_the_comparison(comparison):
    result = shares(comparison, {"full": 2, "arm": 1})
    for wrong in (dict(arm="other"), dict(arm="arm", of="x"), dict(arm="arm", metric="f1")):
        with pytest.raises(ValueError, match="arms are full, arm, metrics accuracy, nll"):
            assert_within(result, **wrong)


@pytest.mark.parametrize("by", [float("nan"), float("inf"), "0.1", None, True])
def test_a_bound_is_a_number(comparison, by):
    with pytest.raises(PICacheError, match="by must be a number in units of 'accuracy'"):
        assert_within(shares(comparison, {"full": 2, "arm": 1}), "arm", by=by)
