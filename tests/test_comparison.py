"""What `compare` of each package returns: paired intervals, a table, a figure, a JSON file."""

import dataclasses
import importlib
import inspect
import json
import math

import numpy as np
import pytest

ERRORS = {"picache": "PICacheError", "sparsity": "SparsityError", "demand": "DemandError"}


@pytest.fixture(params=ERRORS)
def package(request):
    return request.param


@pytest.fixture
def comparison(package):
    return importlib.import_module(f"{package}.comparison").Comparison


@pytest.fixture
def refusal(package):
    return getattr(importlib.import_module(f"{package}.errors"), ERRORS[package])


@pytest.fixture
def result(comparison):
    """Two arms on 200 texts that differ far more than the arms do; `b` is half a nat worse."""
    rng = np.random.default_rng(0)
    hard = rng.normal(size=200) * 10
    a, b = hard + rng.normal(size=200) * 0.1, hard + 0.5
    right = (hard < 0).astype(float)
    measured = {"a": {"nll": a, "right": right}, "b": {"nll": b, "right": right * 0.0}}
    return comparison(measured, "texts", frozenset({"right"}), {"model": "m"})


def test_the_copies_are_one_file():
    """Wherever the packages are: in this checkout, or installed."""
    texts = {
        package: inspect.getsource(importlib.import_module(f"{package}.comparison"))
        for package in ERRORS
    }
    texts = {package: text.replace(ERRORS[package], "Error") for package, text in texts.items()}
    same = {text.replace(f"from {package}.", "from package.") for package, text in texts.items()}
    assert len(same) == 1


def test_intervals_are_paired(result):
    apart = result.difference("b", "nll")
    assert apart.low < 0.5 < apart.high
    assert apart.high - apart.low < 0.1  # what both share cancels
    assert result["a"]["nll"].high - result["a"]["nll"].low > 1.0
    back = result.difference("a", "nll", of="b")
    assert back == pytest.approx((-apart.estimate, -apart.high, -apart.low))


def test_an_interval_is_that_of_a_bootstrap_by_hand(result):
    values = result.measured["a"]["nll"]
    draws = np.random.default_rng(0).integers(200, size=(2000, 200))
    means = sorted(float(values[draw].mean()) for draw in draws)
    found = result["a"]["nll"]
    assert found.estimate == pytest.approx(values.mean())
    assert means[48] <= found.low <= means[51]
    assert means[1948] <= found.high <= means[1951]


def test_a_loss_is_positive_where_an_arm_is_worse(result):
    assert result.loss("b", "nll").low > 0.0  # more nats
    share = result["a"]["right"].estimate
    assert result.loss("b", "right").estimate == pytest.approx(share)  # fewer right
    assert result.loss("b", "right").low > 0.0
    assert result.loss("a", "right", of="b").high < 0.0


def test_what_was_not_measured_is_refused(result, refusal):
    with pytest.raises(refusal, match="there is no arm 'c'; there are a, b"):
        result["c"]
    assert "a" in result
    assert "c" not in result
    with pytest.raises(refusal, match="no 'kl' of 'a'"):
        result.difference("a", "kl")
    with pytest.raises(refusal, match="no metric 'kl'; there are nll, right"):
        result.figure("kl", "nll")


def test_it_shows_itself(result):
    assert str(result).startswith("arm")
    assert "200 texts, 95 % intervals of the mean" in str(result)
    assert str(result["b"]["nll"]) in str(result)
    assert "<caption>200 texts" in result._repr_html_()
    axes = result.figure("right", "nll")
    assert axes.get_xlabel() == "right"
    assert [text.get_text() for text in axes.texts] == ["a", "b"]
    assert result.figure().get_ylabel() == "right"  # the first two metrics
    drawn = dataclasses.replace(result, drawn=("right", "nll"))
    assert (drawn.figure().get_xlabel(), drawn.figure().get_ylabel()) == ("right", "nll")
    assert drawn.figure(ax=axes) is axes


def test_names_are_no_markup(comparison):
    one = {"nll": np.zeros(2)}
    shown = comparison({"<b>": one}, "texts")._repr_html_()
    assert "<b>" not in shown
    assert "&lt;b&gt;" in shown


def test_a_place_that_cannot_be_written_to_is_named(result, tmp_path, comparison):
    error = ERRORS[comparison.__module__.partition(".")[0]]
    for place in (tmp_path, tmp_path / "missing" / "result.json"):
        with pytest.raises(Exception, match="in a folder that there is") as refused:
            result.to_json(place)
        assert type(refused.value).__name__ == error
        assert str(place) in str(refused.value)


def test_json_has_every_number(result, tmp_path):
    path = tmp_path / "result.json"
    assert path.write_text("before")
    text = result.to_json(path)
    record = json.loads(path.read_text())
    assert record == json.loads(text)
    assert record["values"]["b"]["nll"] == result.measured["b"]["nll"].tolist()
    assert [row["arm"] for row in record["table"]] == ["a", "b"]
    assert record["settings"] == {"model": "m"}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]  # nothing half written stays


def test_what_was_not_measured_is_null_and_a_dash(comparison):
    result = comparison({"a": {"f1": np.array([math.nan, math.nan])}}, "texts")
    assert json.loads(result.to_json())["table"][0]["f1"] is None
    assert str(result["a"]["f1"]) == "-"
