"""Which samples the filter of Hermes keeps, against a twin that goes through the runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from demand import Execution, PDGraph, Progress, Unit
from demand.refine import PearsonFilter

PLAN, MAP, END_UNIT = Unit("plan", "llm"), Unit("map", "llm"), Unit("write", "llm")


def runs(n, seed=0):
    """plan's output sets map's parallelism; map comes one to three times; write knows nothing."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        planned = int(rng.integers(10, 200))
        run = [Execution(PLAN, 100, planned)]
        for _ in range(rng.integers(1, 4)):
            calls = max(1, planned // 10 + int(rng.integers(-1, 2)))
            run.append(Execution(MAP, 50, int(rng.integers(5, 50)), calls))
        out.append([*run, Execution(END_UNIT, 10, int(rng.integers(5, 50)))])
    return out


def twin(graph, downstream, upstream, attribute):
    """Values of the last `upstream` before each sample of `downstream`, run by run."""
    values = []
    for run in graph.runs:
        last = None
        for execution in run:
            if execution.unit.name == downstream:
                values.append(np.nan if last is None else getattr(last, attribute))
            if execution.unit.name == upstream:
                last = execution
    return np.array(values)


def test_filters_are_found_where_attributes_correlate():
    graph = PDGraph.fit(runs(400))
    refined = PearsonFilter().fit(graph)
    node = graph.walk_arrays().nodes
    on_map = {(f.upstream, f.attribute) for f in refined.filters[node["map"]]}
    # Earlier rounds of map have the same plan behind them, so their parallelism tells too.
    assert {("plan", "output_tokens"), ("map", "parallelism")} <= on_map
    assert ("plan", "input_tokens") not in on_map  # constant
    assert not refined.filters[node["write"]]
    assert not refined.filters[node["plan"]]
    strengths = [f.correlation for f in refined.filters[node["map"]]]
    assert strengths == sorted(strengths, reverse=True)
    assert min(strengths) > 0.5


def test_correlations_and_values_are_those_of_the_twin():
    graph = PDGraph.fit(runs(150, seed=1))
    refined = PearsonFilter().fit(graph)
    found = refined.filters[graph.walk_arrays().nodes["map"]]
    for one in found:
        if one.attribute == "seconds":
            continue
        values = twin(graph, "map", one.upstream, one.attribute)
        assert np.array_equal(one.values, values, equal_nan=True)
        downstream = graph.samples("map")
        known = ~np.isnan(values)
        strongest = max(
            abs(np.corrcoef(values[known], np.array(column)[known])[0, 1])
            for column in (
                [e.output_tokens for e in downstream],
                [e.parallelism for e in downstream],
                [graph.cost.seconds(e) for e in downstream],
            )
        )
        assert one.correlation == pytest.approx(strongest)


def test_the_nearest_tenth_is_kept_and_ties_with_it():
    graph = PDGraph.fit(runs(400))
    refined = PearsonFilter().fit(graph)
    node = graph.walk_arrays().nodes["map"]
    kept = refined.kept(Progress([Execution(PLAN, 100, 100)]))[node]
    values = twin(graph, "map", "plan", "output_tokens")
    distance = np.abs(values - 100)
    assert kept.size >= values.size / 10
    assert distance[kept].max() <= np.delete(distance, kept).min()
    calls = [graph.samples("map")[at].parallelism for at in kept]
    assert 9 <= np.mean(calls) <= 11


def test_too_few_samples_leave_all():
    graph = PDGraph.fit(runs(400))
    seen = Progress([Execution(PLAN, 100, 100)])
    assert PearsonFilter(minimum=10_000).fit(graph).kept(seen) == {}
    assert PearsonFilter(threshold=0.999).fit(graph).kept(seen) == {}
    assert PearsonFilter().fit(graph).kept(Progress()) == {}
    unfiltered = PearsonFilter(minimum=10_000, walks=20_000).remaining(graph, seen)
    assert unfiltered.mean() == pytest.approx(graph.remaining(seen, walks=20_000).mean(), rel=0.03)


def test_filters_hold_for_the_first_visit_only():
    """Ten rounds, told by their prompt: second rounds alone never end."""
    loop = Unit("round", "llm")
    counted = [[Execution(loop, 100 * (i + 1), 1) for i in range(10)] for _ in range(100)]
    graph = PDGraph.fit(counted)
    refined = PearsonFilter().fit(graph)
    first = Progress([Execution(loop, 100, 1)])
    assert refined.arrays.keeping(refined.kept(first)).without_end() == ["start", "round"]
    assert refined.remaining(first).mean() == pytest.approx(graph.remaining(first).mean(), rel=0.3)


def test_a_finished_unit_is_not_filtered_by_itself():
    """What follows a unit is drawn from all its samples; the filter is for its next execution."""
    loop = Unit("round", "llm")
    rng = np.random.default_rng(0)
    long_then_short = [
        [Execution(loop, 0, int(size)), Execution(loop, 0, int(size) + 1)]
        for size in rng.integers(1, 1000, 300)
    ]
    graph = PDGraph.fit(long_then_short)
    refined = PearsonFilter(walks=4000).fit(graph)
    seen = Progress([Execution(loop, 0, 500)])
    assert refined.kept(seen)  # the second is like the first
    remaining = refined.remaining(seen)
    assert remaining.weights[remaining.values == 0.0].sum() == pytest.approx(0.5, abs=0.03)


def test_weights_of_runs_carry_over_to_the_samples_kept():
    graph = PDGraph.fit(runs(400), half_life_runs=50.0)
    refined = PearsonFilter().fit(graph)
    kept = refined.kept(Progress([Execution(PLAN, 100, 100)]))
    arrays, node = graph.walk_arrays(), graph.walk_arrays().nodes["map"]
    own = arrays.keeping(kept)
    weights = own.weights[own.offsets[node] : own.offsets[node + 1]]
    before = arrays.weights[arrays.offsets[node] + kept[node]]
    assert weights == pytest.approx(before / before.sum())


def test_what_the_docstring_says_is_what_was_measured():
    results = Path(__file__).parents[2] / "docs" / "results"
    said = " ".join(PearsonFilter.__doc__.split())
    sets = json.loads((results / "refinement.json").read_text())["results"]
    crps = [one["calibration"] for one in sets.values()]
    better = [
        round(
            100
            - 100
            * c["Pearson filter"]["crps_ratio_to_none"]
            / c["current unit"]["crps_ratio_to_none"]
        )
        for c in crps
    ]
    assert len(sets) == 7
    assert sorted(better)[-1] == 3
    assert f"({max(better)} % better on one of them)" in said
    closed = {
        (name, policy): {who: round(100 * found["share"]) for who, found in arms.items()}
        for name, one in sets.items()
        for policy, arms in one["gap_closed"].items()
    }
    gpt = closed["ReAct gpt35", "SERPT"]
    assert f"closes {gpt['Pearson filter']} % on ReAct's gpt35" in said
    assert f"FCFS closes {gpt['FCFS']} %" in said
    assert closed["ReAct gpt35", "Gittins"]["Pearson filter"] == 0
    for (name, policy), arms in closed.items():
        if "ReAct" in name and (name, policy) != ("ReAct gpt35", "SERPT"):
            assert arms["Pearson filter"] <= max(arms["FCFS"], arms["nearest runs"])
    lost = [-arms["Pearson filter"] for (name, _), arms in closed.items() if "ReAct" not in name]
    assert f"loses {min(lost)} to {max(lost)} %" in said
    speed = json.loads((results / "estimator.json").read_text())["rows"]
    took = {row["refinement"]: row["after"]["between_units"] for row in speed}
    assert max(took, key=took.__getitem__) == "PearsonFilter"
    assert f"{took['PearsonFilter']:.1f} ms an answer" in said
