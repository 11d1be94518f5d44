"""Every refinement: what holds for all of them, and what each is for."""

import numpy as np
import pytest

from demand import CostModel, DemandError, Distribution, Execution, PDGraph, Progress, Unit
from demand.refine import (
    CurrentUnit,
    NearestRuns,
    NoRefinement,
    PearsonFilter,
    ProgressRegression,
    PromptRegression,
    WholeRuns,
)
from demand.refine.calibration import calibrate
from demand.refine.features import ProgressFeatures

A, B, LOOP = Unit("a", "tool"), Unit("b", "search"), Unit("loop", "tool")
EVERY = (
    NoRefinement(),
    WholeRuns(),
    CurrentUnit(),
    PearsonFilter(),
    ProgressRegression(),
    PromptRegression(),
    NearestRuns(),
)


def took(unit, seconds):
    return Execution(unit, seconds=float(seconds))


def correlated_runs(n, seed=0):
    """a takes x in 1 to 10 s, b then 10 x: the first tells all of the second."""
    rng = np.random.default_rng(seed)
    return [[took(A, x), took(B, 10 * x)] for x in rng.uniform(1.0, 10.0, n)]


def counted_runs(n, seed=0):
    """Exactly ten rounds of about 1 s: only the number of rounds tells what is left."""
    rng = np.random.default_rng(seed)
    return [[took(LOOP, s) for s in rng.uniform(0.5, 1.5, 10)] for _ in range(n)]


@pytest.mark.parametrize("refinement", EVERY, ids=repr)
def test_every_refinement_answers_anywhere(refinement):
    graph = PDGraph.fit(correlated_runs(200))
    refined = refinement.fit(graph)
    places = (
        Progress(),
        Progress(current="a", attained_seconds=0.5),
        Progress([took(A, 4.0)]),
        Progress([took(A, 4.0)], current="b", attained_seconds=7.0),
        Progress([took(A, 4.0)], current="b", attained_seconds=1e6),
    )
    for progress in places:
        remaining = refined.remaining(progress)
        assert isinstance(remaining, Distribution)
        assert remaining.mean() > 0.0
        assert remaining == refined.remaining(progress)
        assert remaining == refinement.remaining(graph, progress)
    assert refined.remaining(Progress()).mean() == pytest.approx(5.5 * 11, rel=0.15)


@pytest.mark.parametrize("refinement", EVERY, ids=repr)
def test_every_refinement_refuses_a_graph_without_runs(refinement):
    with pytest.raises(DemandError, match="seen no run"):
        refinement.fit(PDGraph())


@pytest.mark.parametrize("refinement", EVERY[2:], ids=repr)
def test_those_that_look_at_units_refuse_unknown_ones(refinement):
    refined = refinement.fit(PDGraph.fit(correlated_runs(50)))
    with pytest.raises(DemandError, match="'loop' is not in the graph"):
        refined.remaining(Progress([took(LOOP, 1.0)]))


@pytest.mark.parametrize("refinement", EVERY, ids=repr)
def test_every_refinement_counts_the_critical_path(refinement):
    """Ten calls at a time: the sum is ten times the longest."""
    runs = [[Execution(A, parallelism=10, seconds=run[0].seconds)] for run in correlated_runs(100)]
    graph = PDGraph.fit(runs)
    total = refinement.remaining(graph).mean()
    assert refinement.remaining(graph, parallel_calls="critical_path").mean() == pytest.approx(
        total / 10, rel=1e-6
    )


@pytest.mark.parametrize("refinement", EVERY, ids=repr)
def test_a_single_run_is_all_that_is_known(refinement):
    graph = PDGraph.fit([[took(A, 2.0), took(B, 3.0)]])
    assert refinement.remaining(graph, Progress([took(A, 2.0)])).mean() == pytest.approx(
        3.0, rel=0.35
    )


def test_no_refinement_is_the_whole_less_the_seconds():
    graph = PDGraph.fit(correlated_runs(200))
    progress = Progress([took(A, 4.0)], current="b", attained_seconds=2.0)
    assert NoRefinement().remaining(graph, progress) == graph.remaining().condition(6.0)
    totals = [CostModel().run_seconds(run) for run in graph.runs]
    assert WholeRuns().remaining(graph, progress) == Distribution(totals).condition(6.0)


def test_whole_runs_weigh_by_half_life():
    graph = PDGraph.fit([[took(A, 1.0)], [took(A, 2.0)]], half_life_runs=1.0)
    assert WholeRuns().remaining(graph).weights == pytest.approx([1 / 3, 2 / 3])


def test_the_regression_does_not_go_beyond_what_it_saw():
    graph = PDGraph.fit(counted_runs(50))
    refined = ProgressRegression().fit(graph)
    longest = graph.columns().run_seconds().max()
    for far in (Progress([took(LOOP, 1e12)] * 3), Progress([took(LOOP, 1.0)] * 5000)):
        assert 0.0 < refined.remaining(far).mean() < 3 * longest


def test_runs_of_no_weight_worth_mentioning_still_answer():
    old = [[took(A, 9.0), took(B, 90.0)]] * 60
    graph = PDGraph.fit([*old, *[[took(A, 1.0)]] * 60], half_life_runs=0.01)
    for refinement in EVERY:
        assert refinement.remaining(graph, Progress([took(A, 9.0)])).mean() > 0.0


def test_nearest_runs_are_those_of_a_search_through_all():
    """The twin standardises, measures and sorts one boundary at a time."""
    graph = PDGraph.fit([*correlated_runs(40), *counted_runs(20)])
    features = ProgressFeatures({"a": 0, "b": 1, "loop": 2}, graph.cost, "sum")
    table, left = [], []
    for number, run in enumerate(graph.runs):
        for at in range(len(run)):
            table.append((number, features.of_progress(Progress(run[:at]))))
            left.append(sum(e.seconds for e in run[at:]))
    deviation = np.std([row for _, row in table], axis=0)
    for asked in (Progress([took(A, 3.3)]), Progress([took(LOOP, 1.0)] * 5), Progress()):
        place = features.of_progress(asked)
        best: dict[int, tuple[float, float]] = {}
        for (number, row), seconds in zip(table, left, strict=True):
            distance = sum(
                ((x - y) / s) ** 2 for x, y, s in zip(row, place, deviation, strict=True) if s > 0
            )
            best[number] = min(best.get(number, (np.inf, 0.0)), (distance, seconds))
        answered = NearestRuns(k=7).remaining(graph, asked)
        if not asked.executed:
            whole = WholeRuns().remaining(graph)  # all start alike
            assert answered.values == pytest.approx(whole.values)
            assert answered.weights == pytest.approx(whole.weights)
            continue
        expected = Distribution([seconds for _, seconds in sorted(best.values())[:7]])
        assert answered.values == pytest.approx(expected.values)


def test_runs_that_are_equally_near_share_their_places():
    """Before the first unit nothing tells them apart: the oldest are no nearer than the rest."""
    graph = PDGraph.fit([*[[took(A, 1.0)]] * 50, *[[took(A, 100.0)]] * 950])
    assert NearestRuns().remaining(graph).mean() == pytest.approx(95.05)
    newest_first = PDGraph.fit([*[[took(A, 100.0)]] * 950, *[[took(A, 1.0)]] * 50])
    assert NearestRuns().remaining(newest_first) == NearestRuns().remaining(graph)


def test_equally_near_runs_share_what_nearer_ones_leave():
    """Two runs are as near as can be, and eight are level for the third of three places."""
    alike = [[took(A, 2.0), took(B, 7.0)]] * 2
    level = [[took(A, 4.0), took(B, 10.0 + at)] for at in range(8)]
    graph = PDGraph.fit([*level[:5], *alike, *level[5:]], window=10)
    answered = NearestRuns(k=3).remaining(graph, Progress([took(A, 2.0)]))
    assert dict(zip(answered.values, answered.weights, strict=True)) == pytest.approx(
        {7.0: 2 / 3} | {10.0 + at: 1 / 24 for at in range(8)}
    )


def test_equally_near_runs_weigh_by_half_life():
    runs = [[took(A, 1.0)], [took(A, 2.0)], [took(A, 4.0)]]
    answered = NearestRuns(k=1).remaining(PDGraph.fit(runs, half_life_runs=1.0))
    assert answered.values.tolist() == [1.0, 2.0, 4.0]
    assert answered.weights == pytest.approx([1 / 7, 2 / 7, 4 / 7])


def test_current_unit_is_the_walk_of_the_graph():
    graph = PDGraph.fit(correlated_runs(200))
    progress = Progress([took(A, 4.0)])
    assert CurrentUnit().remaining(graph, progress) == graph.remaining(progress)


def test_a_correlation_is_used_by_those_that_look_at_attributes():
    graph = PDGraph.fit(correlated_runs(1000))
    seen = Progress([took(A, 4.0)])
    for refinement in (PearsonFilter(), NearestRuns()):
        remaining = refinement.remaining(graph, seen)
        assert remaining.mean() == pytest.approx(40.0, rel=0.03)
        assert remaining.quantile(0.95) - remaining.quantile(0.05) < 15.0
    assert ProgressRegression().remaining(graph, seen).mean() == pytest.approx(40.0, rel=0.15)
    assert CurrentUnit().remaining(graph, seen).mean() == pytest.approx(55.0, rel=0.1)


def test_rounds_are_counted_by_those_that_look_at_steps():
    graph = PDGraph.fit(counted_runs(300))
    eight = Progress([took(LOOP, 1.0)] * 8)
    for refinement in (ProgressRegression(), NearestRuns()):
        assert refinement.remaining(graph, eight).mean() == pytest.approx(2.0, rel=0.2)
    # A walk forgets the eight: nine more rounds in the mean, ten if there is one at all.
    assert CurrentUnit().remaining(graph, eight).mean() == pytest.approx(10.0, rel=0.1)


def test_held_out_runs_are_predicted_the_better_the_more_is_looked_at():
    graph, held_out = PDGraph.fit(correlated_runs(500)), correlated_runs(200, seed=1)
    score = {
        type(r).__name__: calibrate(r.fit(graph).remaining, held_out, [1]).overall.crps
        for r in EVERY
    }
    assert score["PearsonFilter"] < 0.25 * score["CurrentUnit"]
    assert score["NearestRuns"] < 0.25 * score["CurrentUnit"]
    assert score["ProgressRegression"] < 0.4 * score["CurrentUnit"]
    assert score["CurrentUnit"] < 1.05 * score["NoRefinement"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PearsonFilter(threshold=1.0), "threshold is 1.0"),
        (lambda: PearsonFilter(buckets=0), "buckets is 0"),
        (lambda: PearsonFilter(minimum=0), "minimum is 0"),
        (lambda: ProgressRegression(ridge=-1.0), "ridge is -1.0"),
        (lambda: ProgressRegression(atoms=0), "atoms is 0"),
        (lambda: NearestRuns(k=0), "k is 0"),
        (lambda: NoRefinement(walks=0).fit(PDGraph.fit(correlated_runs(2))), "walks is 0"),
    ],
)
def test_bad_configuration_is_refused(make, says):
    with pytest.raises(DemandError, match=says):
        make()
