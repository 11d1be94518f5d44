from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demand import CostModel, DemandError, Distribution, Execution, Progress, Unit
from demand.refine.calibration import LEVELS, calibrate, crps, pit
from tests.demand.strategies import distributions

TOOL = Unit("work", "tool")


def worked(*seconds):
    return [Execution(TOOL, seconds=float(s)) for s in seconds]


def crps_twin(predicted, observed):
    """The integral of the squared distance to the step at the observation, piece by piece."""
    edges = np.unique([*predicted.values, observed])
    total = 0.0
    for left, right in pairwise(edges):
        below = predicted.weights[predicted.values <= left].sum()
        total += (right - left) * (below - (left >= observed)) ** 2
    return total


@given(distributions(), st.floats(0.0, 200.0))
def test_crps_is_the_integral(predicted, observed):
    assert crps(predicted, observed) == pytest.approx(crps_twin(predicted, observed), abs=1e-9)


def test_crps_of_a_point_mass_is_the_error():
    assert crps(Distribution([5.0]), 7.5) == 2.5
    # Uniform on two points: E|X - y| - E|X - X'| / 2 = 2 - 1.
    assert crps(Distribution([0.0, 4.0]), 2.0) == pytest.approx(1.0)


@given(distributions(), st.floats(0.0, 200.0), st.floats(0.0, 1.0))
def test_crps_scales_with_its_unit(predicted, observed, factor):
    factor += 0.1
    scaled = Distribution(factor * predicted.values, predicted.weights)
    assert crps(scaled, factor * observed) == pytest.approx(
        factor * crps(predicted, observed), abs=1e-9
    )


def test_pit_is_randomised_over_an_atom():
    predicted = Distribution([1.0, 2.0, 3.0], [0.2, 0.5, 0.3])
    assert pit(predicted, 0.5, 0.9) == 0.0
    assert pit(predicted, 2.0, 0.0) == pytest.approx(0.2)
    assert pit(predicted, 2.0, 1.0) == pytest.approx(0.7)
    assert pit(predicted, 9.0, 0.1) == pytest.approx(1.0)


def exponential_runs(n, seed=0):
    return [worked(s) for s in np.random.default_rng(seed).exponential(10.0, n)]


def test_the_true_distribution_is_calibrated():
    known = Distribution(-10.0 * np.log(1.0 - (np.arange(500) + 0.5) / 500))
    report = calibrate(lambda progress: known, exponential_runs(2000), [0])
    assert report.overall.coverage == pytest.approx(LEVELS, abs=0.03)
    assert report.pit_histogram() == pytest.approx(np.ones(10), abs=0.25)
    assert report.pit_histogram().mean() == pytest.approx(1.0)
    # E CRPS of an exponential of mean m that is right: m / 2 (half the mean absolute difference).
    assert report.overall.crps == pytest.approx(5.0, rel=0.05)
    assert report.overall.predicted == pytest.approx(report.overall.observed, rel=0.06)


def test_wrong_distributions_show_in_the_histogram():
    narrow = calibrate(lambda progress: Distribution([9.0, 11.0]), exponential_runs(500), [0])
    assert narrow.overall.coverage[-1] < 0.3
    assert narrow.pit_histogram()[[0, -1]].min() > 2.0
    long = calibrate(lambda progress: Distribution([100.0, 200.0]), exponential_runs(500), [0])
    assert long.pit_histogram()[0] > 9.0
    right = calibrate(lambda progress: Distribution([6.9]), exponential_runs(500), [0])
    assert right.overall.crps < narrow.overall.crps + 2.0 < long.overall.crps


def test_it_asks_where_runs_are_not_over():
    asked = []

    def predict(progress):
        asked.append(progress)
        return Distribution([0.0, 2.0])

    report = calibrate(predict, [worked(1, 2, 3), worked(4)], [0, 1, 5])
    assert asked == [Progress([]), Progress([]), Progress(worked(1))]
    assert [(p.after_units, p.runs) for p in report.points] == [(0, 2), (1, 1)]
    assert report.points[1].observed == 5.0
    assert report.points[1].predicted == 2.0  # the atom at 0 says nothing of a run that goes on
    assert report.overall.runs == 3


def test_costs_and_critical_paths_are_asked_for():
    run = [Execution(Unit("write", "llm"), 0, 100, parallelism=3)]
    at = dict(cost=CostModel(0.0, 0.1), after_units=[0])
    known = Distribution([10.0])
    assert calibrate(lambda p: known, [run], **at).overall.observed == pytest.approx(30.0)
    path = calibrate(lambda p: known, [run], parallel_calls="critical_path", **at)
    assert (path.overall.observed, path.overall.crps) == (pytest.approx(10.0), pytest.approx(0.0))


def test_it_prints_a_table():
    report = calibrate(lambda progress: Distribution([2.0]), [worked(1, 2), worked(2)], [0, 1])
    lines = str(report).splitlines()
    assert lines[0].split() == (
        "after units runs remaining s predicted s CRPS s in 50% in 80% in 95%".split()
    )
    assert lines[1].split() == ["0", "2", "2.5", "2", "0.5", "50%", "50%", "50%"]
    assert lines[2].split()[:2] == ["1", "1"]
    assert lines[3].split()[:2] == ["all", "3"]
    assert len({len(line) for line in lines}) == 1


def test_it_draws_its_histogram():
    pytest.importorskip("matplotlib")
    report = calibrate(lambda progress: Distribution([2.0, 3.0]), [worked(1), worked(2)], [0])
    ax = report.figure(bins=4)
    assert ax.patches[0].get_data().values == pytest.approx(report.pit_histogram(4))
    assert report.figure(ax) is ax


def test_runs_that_reach_no_point_are_refused():
    with pytest.raises(DemandError, match=r"none of 1 runs has more units than \[5\]"):
        calibrate(lambda progress: Distribution([1.0]), [worked(1)], [5])


def test_what_cannot_be_scored_is_refused():
    known = Distribution([1.0, 2.0])
    for score in (lambda: crps(known, np.nan), lambda: pit(known, np.inf, 0.5)):
        with pytest.raises(DemandError, match="expected the finite seconds"):
            score()
    run = [Execution(Unit("a", "tool"), seconds=1.0)]
    with pytest.raises(
        DemandError, match="after_units is -1; expected a whole number of at least 0"
    ):
        calibrate(lambda progress: known, [run], after_units=(-1,))
