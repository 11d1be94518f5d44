"""Laws that hold for every graph."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demand import CostModel, Execution, PDGraph, Progress, Unit

KINDS = dict(a="tool", b="llm", c="search")


@st.composite
def executions(draw):
    name = draw(st.sampled_from("abc"))
    calls = draw(st.integers(1, 4))
    if KINDS[name] == "llm":
        tokens = draw(st.lists(st.integers(1, 500), min_size=calls, max_size=calls))
        return Execution.of_calls(Unit(name, "llm"), input_tokens=tokens, output_tokens=tokens)
    measured = st.floats(0.0, 50.0, allow_subnormal=False)  # of those even a mean is rounded to 0
    seconds = draw(st.lists(measured, min_size=calls, max_size=calls))
    return Execution.of_calls(Unit(name, KINDS[name]), seconds=seconds)


runs = st.lists(st.lists(executions(), min_size=1, max_size=6), min_size=1, max_size=8)
half_lives = st.none() | st.floats(0.5, 100.0)
demands = st.sampled_from(["sum", "critical_path"])


def expected_seconds(arrays, node):
    """Slow twin of the walks: expected seconds from each node by the linear equations."""
    n = len(arrays.nodes)
    moves, mean = np.zeros((n, n)), np.zeros(n)
    for at in range(1, n):
        own = slice(arrays.offsets[at], arrays.offsets[at + 1])
        weights = np.ones(own.stop - own.start) if arrays.weights is None else arrays.weights[own]
        weights = weights / weights.sum()
        mean[at] = weights @ arrays.seconds[own]
        np.add.at(moves[at], arrays.successors[own], weights)
    return np.linalg.solve(np.eye(n) - moves, mean)[node]


@given(runs, half_lives, demands)
def test_the_mean_walk_takes_as_long_as_the_mean_run(runs, half_life, demand):
    """Walks mix runs up, but keep the mean: visits and seconds of each unit are frequencies."""
    graph = PDGraph.fit(runs, half_life_runs=half_life)
    arrays = graph.walk_arrays(demand)
    totals = [CostModel().run_seconds(run, demand) for run in runs]
    assert expected_seconds(arrays, arrays.nodes["start"]) == pytest.approx(
        np.average(totals, weights=graph.run_weights()), rel=1e-6, abs=1e-6
    )


def test_walks_agree_with_the_linear_equations():
    rng = np.random.default_rng(5)
    units = [Unit(name, "tool") for name in "abcd"]
    runs = [
        [Execution(units[rng.integers(4)], seconds=rng.exponential(3.0)) for _ in range(k)]
        for k in rng.integers(1, 9, 300)
    ]
    for half_life in (None, 40.0):
        graph = PDGraph.fit(runs, half_life_runs=half_life)
        arrays = graph.walk_arrays()
        for progress, name in ((Progress(), "start"), (Progress(current="b"), "b")):
            walked = graph.remaining(progress, walks=40_000)
            assert walked.values @ walked.weights == pytest.approx(
                expected_seconds(arrays, arrays.nodes[name]), rel=0.02
            )


@given(runs, half_lives)
def test_branches_are_probabilities(runs, half_life):
    graph = PDGraph.fit(runs, half_life_runs=half_life)
    for name in ("start", *(unit.name for unit in graph.units)):
        branches = graph.branches(name)
        assert sum(branches.values()) == pytest.approx(1.0)
        assert all(probability > 0.0 for probability in branches.values())


@given(runs)
def test_the_critical_path_is_never_longer_than_the_sum(runs):
    graph = PDGraph.fit(runs)
    total, path = (
        graph.remaining(walks=50),
        graph.remaining(parallel_calls="critical_path", walks=50),
    )
    assert path.values.max() <= total.values.max() * (1 + 1e-12)
    assert path.values @ path.weights <= (total.values @ total.weights) * (1 + 1e-12)


@given(runs, half_lives, st.integers(1, 10))
def test_a_saved_graph_is_the_same_graph(tmp_path_factory, runs, half_life, window):
    graph = PDGraph.fit(runs, window=window, half_life_runs=half_life)
    path = tmp_path_factory.mktemp("graph") / "graph.json"
    graph.save(path)
    again = PDGraph.load(path)
    assert again.runs == graph.runs
    assert again.remaining(walks=20) == graph.remaining(walks=20)
    again.save(path.with_name("again.json"))
    assert json.loads(path.with_name("again.json").read_text()) == json.loads(path.read_text())


@given(runs, st.integers(0, 3))
def test_drawn_runs_take_only_branches_that_were_seen(runs, seed):
    graph = PDGraph.fit(runs)
    for run in graph.draw_runs(5, seed=seed):
        names = ["start", *(execution.unit.name for execution in run), "end"]
        for name, following in pairwise(names):
            assert following in graph.branches(name)
        assert all(execution in graph.samples(execution.unit.name) for execution in run)
