"""KV that calls leave for the next ones of their run, against the twin and by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import (
    FCFS,
    CostModel,
    DemandError,
    Distribution,
    Execution,
    PDGraph,
    Unit,
    Workload,
    simulate_engine,
)
from demand.simulation.engine import LRU, Engine, KeepAll, NextUse
from demand.simulation.engine.next_use import NEVER_SECONDS, next_use
from demand.simulation.engine.retention import LeftKV
from demand.traces import Session, Span
from tests.demand.engine_twin import step_by_step
from tests.demand.test_engine import POLICIES, WHOLE_COST, quarters, running_first, workloads

THINK, TOOL, CODE = Unit("think", "llm"), Unit("tool", "tool"), Unit("code", "llm")
RETENTIONS = [LRU(), KeepAll(0.5), KeepAll(1.0), NextUse(), NextUse(8.0, 0.5), NextUse(1e3, 1.0)]


@st.composite
def calls(draw):
    prompt = draw(st.integers(1, 40))
    return Execution(
        draw(st.sampled_from([THINK, THINK, CODE])), prompt, draw(st.integers(1, 12)),
        parallelism=draw(st.sampled_from([1, 1, 1, 2])),
        shared_tokens=draw(st.none() | st.integers(0, prompt)),
    )  # fmt: skip


tool = st.builds(Execution, st.just(TOOL), seconds=quarters)
runs = st.lists(st.one_of(calls(), calls(), tool), min_size=1, max_size=6)


@st.composite
def with_graphs(draw):
    workload = draw(workloads(runs))
    graphs = {
        name: PDGraph.fit(draw(st.lists(runs, min_size=1, max_size=3)), cost=WHOLE_COST)
        for name in "abc"
    }
    return replace(workload, graphs=graphs)


@st.composite
def engines_that_keep(draw):
    engine = draw(running_first())
    blocks = draw(st.integers(14, 40))
    return replace(engine, blocks=blocks, retention=draw(st.sampled_from(RETENTIONS)))


@settings(max_examples=100, deadline=None)
@given(with_graphs(), engines_that_keep(), st.sampled_from(POLICIES))
def test_jumping_over_equal_steps_changes_nothing(workload, engine, policy):
    result = simulate_engine(workload, policy, engine, cost=WHOLE_COST)
    twin = step_by_step(workload, policy, engine, WHOLE_COST)
    np.testing.assert_array_equal(result.completion_times, twin.completion_times)
    for name in ("steps", "preemptions", "prefilled_again", "peak_blocks"):
        assert getattr(result, name) == getattr(twin, name), name
    assert (result.prefixes.looked_up, result.prefixes.found) == (twin.looked_up, twin.found)
    assert result.prefixes.held_block_seconds == pytest.approx(twin.held_block_seconds)
    assert result.prefixes.findable == twin.findable
    assert result.prefixes.found <= result.prefixes.findable <= result.prefixes.looked_up


def two_calls(seconds, shared=7, arrivals=(0.0,), graph=True):
    """Runs of a call of 4 + 4 tokens, a tool, and a call that begins with the 7 of KV it left."""
    run = [
        Execution(THINK, 4, 4),
        Execution(TOOL, seconds=seconds),
        Execution(THINK, 9, 1, shared_tokens=shared),
    ]
    graphs = {"a": PDGraph.fit([run])} if graph else {}
    n = len(arrivals)
    return Workload(
        arrivals, [1.0] * n, "a" * n, {"a": Distribution([1.0])}, runs=[run] * n, graphs=graphs
    )


def keeping(retention, blocks=100, budget=3, requests=4):
    engine = Engine.counting_steps(requests, budget, blocks, 2, "none", "running_first")
    return replace(engine, retention=retention)


@pytest.mark.parametrize("retention", [LRU(), KeepAll(), NextUse(), NextUse(5.0)], ids=repr)
def test_what_a_call_left_is_not_computed_again(retention):
    """Of 7 tokens of KV three blocks of two are whole: 3 of 9 tokens are left, one step."""
    result = simulate_engine(two_calls(2.0), FCFS(), keeping(retention))
    # The prompt of 4 takes two steps of 3 tokens, three more tokens three steps.
    assert result.completion_times.tolist() == [5 + 2 + 1]
    assert result.prefixes[:3] == (4 + 9, 6, 6)
    assert repr(result).endswith(", 46.2% of prompt tokens found again)")
    dropped = simulate_engine(two_calls(2.0), FCFS(), keeping(None))
    assert dropped.completion_times.tolist() == [5 + 2 + 3]
    assert dropped.prefixes.hit_rate == 0.0


def test_the_last_token_is_always_computed():
    run = [Execution(THINK, 4, 5), Execution(THINK, 8, 1, shared_tokens=8)]
    workload = Workload([0], [1], "a", {"a": Distribution([1.0])}, runs=[run])
    result = simulate_engine(workload, FCFS(), keeping(LRU()))
    assert result.prefixes.found == 6  # three blocks: the fourth has the last token


def test_a_first_call_can_find_nothing_whatever_it_says_to_share():
    run = [Execution(THINK, 9, 4, shared_tokens=8), Execution(THINK, 9, 1, shared_tokens=6)]
    workload = Workload([0], [1], "a", {"a": Distribution([1.0])}, runs=[run])
    result = simulate_engine(workload, FCFS(), keeping(KeepAll(1.0)))
    assert result.prefixes[:3] == (9 + 9, 6, 6)


def test_only_the_same_unit_of_the_same_run_finds_it():
    run = [Execution(THINK, 4, 4), Execution(CODE, 9, 1, shared_tokens=7)]
    workload = Workload([0, 20], [1, 1], "aa", {"a": Distribution([1.0])}, runs=[run] * 2)
    assert simulate_engine(workload, FCFS(), keeping(LRU())).prefixes.found == 0


def test_what_is_held_stays_for_its_run_and_others_wait():
    """At second 6 a prompt wants six blocks: four are in use, three of the others have KV."""
    first = two_calls(20.0).runs[0]
    runs = [first, [Execution(CODE, 2, 9)], [Execution(CODE, 12, 1)]]
    workload = Workload(
        [0, 0, 6], [1, 1, 1], "abb", {n: Distribution([1.0]) for n in "ab"}, runs=runs
    )
    given_up, held = (
        simulate_engine(workload, FCFS(), keeping(retention, blocks=10, budget=20))
        for retention in (LRU(), KeepAll(1.0))
    )
    assert given_up.completion_times[2] == 1
    assert given_up.prefixes.found == 0
    assert held.completion_times[2] == (9 - 6) + 1  # the other is over, and nobody runs
    assert held.prefixes.found == 6
    assert held.prefixes.held_block_seconds == 3 * (9 - 4) + 3 * 1


def test_what_is_held_lapses_in_the_middle_of_equal_steps():
    """Three blocks are left at second 4, and held until the 9th; equal steps go on to the 40th."""
    runs = [two_calls(100.0).runs[0], [Execution(CODE, 2, 40)]]
    graph = PDGraph.fit([two_calls(seconds).runs[0] for seconds in (5.0, 1e6)])
    workload = Workload(
        [0, 0], [1, 1], "ab", {n: Distribution([1.0]) for n in "ab"}, runs=runs,
        graphs={"a": graph},
    )  # fmt: skip
    # At age a below 5 the rank is 4 (5 - a): of four uses one is by then. After it, 1e6 and more.
    engine = keeping(NextUse(price=30.0, limit=1.0), budget=20)
    result = simulate_engine(workload, FCFS(), engine)
    twin = step_by_step(workload, FCFS(), engine)
    assert result.prefixes.held_block_seconds == twin.held_block_seconds == 3 * 5
    assert result.decisions < 10


def test_the_time_to_the_next_use_is_that_of_the_graph():
    runs = [
        [Execution(THINK, 4, 4), Execution(TOOL, seconds=3.0), Execution(THINK, 9, 1)],
        [Execution(THINK, 4, 4), Execution(CODE, 10, 10), Execution(TOOL, seconds=5.0)],
    ]
    graph = PDGraph.fit(runs)
    known = next_use(graph, "think", CostModel(0.1, 1.0))
    assert known.values.tolist() == [3.0, NEVER_SECONDS]
    np.testing.assert_allclose(known.weights, [1 / 3, 2 / 3])
    assert next_use(graph, "draw", CostModel()) is None
    left = LeftKV("a", "think", 4, 10.0, 0, table=NextUse().table("think", graph, CostModel()))
    # By then a third is back; the price is E[min(T, 3)] / P(T <= 3) = 3 / (1/3).
    assert NextUse().rank(left, 10.0) == pytest.approx(9.0)
    assert NextUse(price=9.5).holds(left, 10.0)
    assert not NextUse(price=8.0).holds(left, 10.0)
    left.wanted = 12.0
    assert NextUse().rank(left, 13.0) < 0.0


def test_the_next_use_weighs_runs_as_the_graph_does():
    def run(seconds):
        return [Execution(THINK, 4, 4), Execution(TOOL, seconds=seconds), Execution(THINK, 9, 1)]

    graph = PDGraph.fit([run(3.0), run(5.0)], half_life_runs=1.0)
    known = next_use(graph, "think", CostModel())
    assert known.values.tolist() == [3.0, 5.0, NEVER_SECONDS]
    np.testing.assert_allclose(known.weights, [1 / 6, 1 / 3, 1 / 2])


def test_nothing_is_known_of_the_next_use_in_a_graph_that_has_no_runs_yet():
    workload = replace(two_calls(2.0), graphs={"a": PDGraph("a")})
    assert next_use(workload.graphs["a"], "think", CostModel()) is None
    result = simulate_engine(workload, FCFS(), keeping(NextUse(5.0)))
    assert result.prefixes.found == 6  # by the time it lies


def test_contexts_that_grow_share_what_they_had():
    spans = (
        Span("llm", "llm", 0.0, 1.0, input_tokens=100, output_tokens=20),
        Span("sub", "llm", 2.0, 1.0, input_tokens=50, output_tokens=5, parents=(0,)),
        Span("sub", "llm", 3.0, 1.0, input_tokens=60, output_tokens=5, parents=(1,)),
        Span("tool", "tool", 4.0, 1.0, parents=(0,)),
        Span("llm", "llm", 5.0, 1.0, input_tokens=130, output_tokens=10, parents=(3,)),
        Span("llm", "llm", 6.0, 1.0, input_tokens=40, output_tokens=10, parents=(4,)),
        Span("llm", "llm", 7.0, 1.0, input_tokens=45, output_tokens=1, parents=(5,)),
    )
    session = Session("s", "agent", spans).with_growing_prompts()
    cached = [span.cached_tokens for span in session.spans if span.kind == "llm"]
    assert cached == [0, 0, 55, 120, 0, 45]
    shared = [e.shared_tokens for e in session.run(prompt="shared") if e.unit.kind == "llm"]
    assert shared == cached
    assert session.run(prompt="whole")[0].shared_tokens is None
    with pytest.raises(DemandError, match=r"session\.with_growing_prompts\(\)"):
        Session("s", "agent", spans).run(prompt="shared")


def test_graphs_keep_what_is_shared(tmp_path):
    graph = PDGraph.fit([[Execution(THINK, 9, 1, shared_tokens=7), Execution(THINK, 9, 2)]])
    graph.save(tmp_path / "graph.json")
    assert PDGraph.load(tmp_path / "graph.json").runs == graph.runs


def test_bad_input_is_refused():
    with pytest.raises(DemandError, match="shared_tokens of unit 'think' are 10"):
        Execution(THINK, 9, 1, shared_tokens=10)
    with pytest.raises(DemandError, match="retention is 'lru'"):
        Engine(retention="lru")
    with pytest.raises(DemandError, match=r'retention is LRU\(\) under scheduling="by_rank"'):
        Engine(retention=LRU(), scheduling="by_rank")
    with pytest.raises(DemandError, match="limit"):
        KeepAll(1.5)
    with pytest.raises(DemandError, match="price"):
        NextUse(price=-1.0)
