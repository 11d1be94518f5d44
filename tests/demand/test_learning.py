"""Learning run by run: arrays that grow, moments that are merged, answers that lag by a bound."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demand import CostModel, DemandError, Execution, PDGraph, Progress, Unit
from demand.refine import (
    CurrentUnit,
    NearestRuns,
    ProgressRegression,
    WholeRuns,
)
from demand.refine.estimator import DemandEstimator
from demand.refine.features import ProgressFeatures
from demand.refine.log_ridge import Moments
from tests.demand.test_refine import correlated_runs, counted_runs

LLM = Unit("write", "llm")
UNITS = [LLM, Unit("test", "tool"), Unit("ask", "human")]


@st.composite
def executions(draw):
    unit = draw(st.sampled_from(UNITS))
    calls = draw(st.integers(1, 3))
    if unit is LLM:
        return Execution(unit, draw(st.integers(1, 99)), draw(st.integers(1, 99)), calls)
    return Execution(unit, parallelism=calls, seconds=draw(st.integers(0, 40)) / 7)


many_runs = st.lists(st.lists(executions(), min_size=1, max_size=5), min_size=1, max_size=8)


@given(many_runs, st.integers(1, 4))
def test_columns_are_those_of_all_remembered_runs_written_out(runs, window):
    graph = PDGraph(window=window)
    for run in runs:
        graph.observe(run)
        remembered = graph.runs
        flat = [execution for each in remembered for execution in each]
        units = list(dict.fromkeys(execution.unit for execution in flat))
        columns = graph.columns()
        assert columns.units == tuple(units) == graph.units
        assert graph.known == {unit.name for unit in units}
        assert columns.unit.tolist() == [units.index(execution.unit) for execution in flat]
        assert np.diff(columns.starts).tolist() == [len(each) for each in remembered]
        for calls in ("sum", "critical_path"):
            expected = [CostModel().seconds(execution, calls) for execution in flat]
            assert columns.seconds[calls].tolist() == expected
        assert columns.attributes[:, :3].tolist() == [
            [e.input_tokens, e.output_tokens, e.parallelism] for e in flat
        ]
        assert columns.attributes[:, 3].tolist() == columns.seconds["sum"].tolist()
    assert graph.observed == len(runs)


@given(many_runs)
def test_features_of_all_runs_are_those_of_each_progress(runs):
    graph = PDGraph.fit(runs)
    features = ProgressFeatures({u.name: n for n, u in enumerate(graph.units)}, graph.cost, "sum")
    seen = features.of_columns(graph.columns())
    row = 0
    for number, run in enumerate(runs):
        for at in range(len(run)):
            np.testing.assert_array_equal(
                seen.features[row], features.of_progress(Progress(run[:at]))
            )
            left = sum(CostModel().seconds(execution) for execution in run[at:])
            assert seen.remaining[row] == pytest.approx(left)
            assert seen.run[row] == number
            row += 1
    assert row == seen.features.shape[0]


@pytest.mark.parametrize("weighted", [False, True])
def test_merged_moments_are_those_of_all_observations(weighted):
    rng = np.random.default_rng(2)
    x = rng.normal(1e6, 1.0, (90, 4))
    x[:, 3] = 5.0
    y, weights = rng.normal(size=90), rng.random(90) + 0.1 if weighted else np.ones(90)
    cut = np.split(np.arange(90), [7, 40])
    merged = Moments.merged([Moments.of(x[own], y[own], weights[own]) for own in cut])
    mean = np.average(x, axis=0, weights=weights)
    centred, off = x - mean, y - np.average(y, weights=weights)
    assert merged.observations == 90
    np.testing.assert_allclose(merged.mean, mean)
    np.testing.assert_allclose(merged.scatter, (centred.T * weights) @ centred, atol=1e-7)
    np.testing.assert_allclose(merged.cross, (centred.T * weights) @ off, atol=1e-7)


def test_the_regression_is_that_of_plain_least_squares():
    """The twin standardises and solves for all runs, without any moments."""
    graph = PDGraph.fit([*correlated_runs(60), *counted_runs(20)], half_life_runs=50.0)
    refined = ProgressRegression(ridge=3.0).fit(graph)
    seen = refined.features.of_columns(graph.columns())
    floor = 1e-3 * graph.columns().run_seconds().mean()
    y, weights = np.log(np.maximum(seen.remaining, floor)), graph.run_weights()[seen.run]
    weights = weights / weights.mean()
    mean = np.average(seen.features, axis=0, weights=weights)
    scale = np.sqrt(np.average((seen.features - mean) ** 2, axis=0, weights=weights))
    z = (seen.features - mean) / np.where(scale > 1e-9, scale, np.inf)
    level = np.average(y, weights=weights)
    slopes = np.linalg.solve(
        (z.T * weights) @ z + 3.0 * np.eye(mean.size), z.T @ (weights * (y - level))
    )
    np.testing.assert_allclose(
        refined.predicted.fitted(seen.features), level + z @ slopes, atol=1e-9
    )


class Counting:
    """How often a refinement was prepared."""

    def __init__(self, monkeypatch, kind):
        self.fits, plain = Counter(), kind.fit

        def fit(refinement, graph, parallel_calls="sum"):
            self.fits[graph.name] += 1
            return plain(refinement, graph, parallel_calls)

        monkeypatch.setattr(kind, "fit", fit)


def test_an_observation_prepares_nothing_until_enough_have_come(monkeypatch):
    counted = Counting(monkeypatch, WholeRuns)
    runs = correlated_runs(300)
    estimator = DemandEstimator({"a": PDGraph.fit(runs[:100], name="a")}, WholeRuns(), lag=0.1)
    before = estimator("a")
    for run in runs[100:110]:
        estimator.observe("a", run)
        assert estimator("a") == before
    estimator.observe("a", runs[110])
    assert estimator("a") == WholeRuns().remaining(PDGraph.fit(runs[:111]))
    counted.fits.clear()
    for run in runs[111:]:
        estimator.observe("a", run)
        estimator("a")
    assert counted.fits["a"] == 10  # 111, 123, 136, 150, 166, 183, 202, 223, 246, 271, 299
    exact = DemandEstimator({"a": PDGraph.fit(runs[:100], name="b")}, WholeRuns(), lag=0)
    for run in runs[100:120]:
        exact.observe("a", run)
        assert exact("a") == WholeRuns().remaining(exact.graphs["a"])


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=60),
    st.sampled_from([0.1, 0.3, 1.0]),
    st.sampled_from([7, 1000]),
    st.sampled_from([None, 3.0, 40.0]),
)
def test_an_answer_that_lags_is_within_its_bound(seconds, lag, window, half_life):
    """No event, and so no value of the distribution function, is off by more than the bound."""
    graph = PDGraph("a", window, half_life_runs=half_life)
    estimator = DemandEstimator({"a": graph}, WholeRuns(), lag=lag)
    for each in seconds:
        estimator.observe("a", [Execution(UNITS[1], seconds=float(each))])
        answer, exact = estimator("a"), WholeRuns().remaining(graph)
        mass = np.zeros((2, 21))
        for row, found in zip(mass, (answer, exact), strict=True):
            row[found.values.astype(int)] = found.weights
        off = np.abs(mass[0] - mass[1]).sum() / 2  # over all events
        full = len(graph.runs) == window
        if half_life is None:
            assert off <= (lag if full else lag / (1 + lag)) + 1e-9
        else:
            assert off <= 2 * math.log(2) * lag + 1e-9


def test_a_new_unit_is_known_at_once():
    estimator = DemandEstimator({"a": PDGraph.fit(correlated_runs(100))}, CurrentUnit())
    estimator("a")
    run = [Execution(UNITS[2], seconds=3.0)]
    estimator.observe("a", run)
    assert estimator("a", Progress(current="ask", attained_seconds=1.0)).values.tolist() == [2.0]
    assert not estimator.fallbacks


def test_what_a_graph_observes_by_itself_counts_too():
    graph = PDGraph.fit(correlated_runs(10))
    estimator = DemandEstimator({"a": graph}, NearestRuns())
    estimator("a")
    for run in correlated_runs(5, seed=1):
        graph.observe(run)
    assert estimator("a") == NearestRuns().remaining(graph)


@pytest.mark.parametrize("lag", [-0.1, math.inf, math.nan, "x"])
def test_a_lag_is_a_share(lag):
    with pytest.raises(DemandError, match="lag"):
        DemandEstimator({}, lag=lag)


def test_a_new_name_in_each_run_prepares_nothing_anew_until_it_is_asked_about(monkeypatch):
    counted = Counting(monkeypatch, CurrentUnit)
    runs = [[Execution(UNITS[1], seconds=float(s))] for s in range(1, 101)]
    estimator = DemandEstimator({"a": PDGraph.fit(runs, name="a")}, CurrentUnit(), lag=0.125)
    asked = Progress(runs[1])
    rare = [Execution(Unit(f"rare {number}", "tool"), seconds=1.0) for number in range(13)]
    for one in rare[:12]:
        estimator("a", asked)
        estimator.observe("a", [*runs[0], one])
    estimator("a", asked)
    assert counted.fits["a"] == 1
    about_it = Progress([rare[3]])
    assert estimator("a", about_it) == CurrentUnit().remaining(estimator.graphs["a"], about_it)
    assert counted.fits["a"] == 3  # one of them to compare with
    estimator("a", Progress([rare[12]]))
    assert (counted.fits["a"], estimator.fallbacks) == (3, {("a", "unit"): 1})
