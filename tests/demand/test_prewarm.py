from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import CostModel, DemandError, Distribution, Execution, PDGraph, Unit
from demand.prewarm import (
    AlwaysAtStart,
    ArtifactPrewarm,
    CallbackBackend,
    CostAwarePlanner,
    NoPrewarm,
    OraclePrewarm,
    Prewarming,
    PrewarmPlanner,
    Start,
    Successor,
    WaitingQueue,
)
from tests.demand.strategies import distributions

probabilities = st.floats(0.0, 1.0)
thresholds = st.floats(0.01, 0.99)
warm_ups = st.one_of(st.floats(0.0, 120.0), st.integers(0, 8).map(float))


def in_time(remaining, probability, warm_seconds, start):
    """p_s * P(t_c >= t_s + t_p), from the definition."""
    over = zip(remaining.values, remaining.weights, strict=True)
    return probability * sum(w for r, w in over if r >= start + warm_seconds - 1e-9)


def latest_start(remaining, probability, warm_seconds, threshold):
    """Slow twin of `PrewarmPlanner.start_seconds`: every start that could be the latest."""
    if probability < threshold:
        return None
    candidates = [0.0, *(float(r) - warm_seconds for r in remaining.values)]
    good = [
        start
        for start in candidates
        if start >= 0.0 and in_time(remaining, probability, warm_seconds, start) >= threshold - 1e-9
    ]
    return max(good, default=0.0)


@given(distributions(), probabilities, warm_ups, thresholds)
def test_the_start_solves_the_equation_of_the_paper(
    remaining, probability, warm_seconds, threshold
):
    start = PrewarmPlanner(threshold).start_seconds(remaining, probability, warm_seconds)
    expected = latest_start(remaining, probability, warm_seconds, threshold)
    if expected is None:
        assert start is None
        return
    assert start == pytest.approx(expected)
    if start > 0.0:
        assert in_time(remaining, probability, warm_seconds, start) >= threshold - 1e-9
        assert in_time(remaining, probability, warm_seconds, start + 1e-6) < threshold


@given(distributions(), probabilities, warm_ups, warm_ups, thresholds, thresholds)
def test_more_certainty_and_longer_warm_ups_start_earlier(
    remaining, probability, short, long, low, high
):
    short, long = sorted((short, long))
    low, high = sorted((low, high))
    careful = PrewarmPlanner(high).start_seconds(remaining, probability, short)
    bold = PrewarmPlanner(low).start_seconds(remaining, probability, short)
    if careful is not None:
        assert bold is not None
        assert careful <= bold
        later = PrewarmPlanner(high).start_seconds(remaining, probability, long)
        assert later is not None
        assert later <= careful


@given(distributions(), warm_ups, thresholds, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_the_likelier_of_two_starts_later(remaining, warm_seconds, threshold, p, q):
    p, q = sorted((p, q))
    planner = PrewarmPlanner(threshold)
    less, more = (planner.start_seconds(remaining, each, warm_seconds) for each in (p, q))
    if less is not None:
        assert more is not None
        assert more >= less


def test_starts_by_hand():
    remaining = Distribution([2.0, 4.0, 6.0, 8.0])
    planner = PrewarmPlanner(0.5)
    assert planner.start_seconds(remaining, 1.0, 1.0) == 5.0  # P(t_c >= 6) = 1/2
    assert planner.start_seconds(remaining, 0.6, 1.0) == 1.0  # P(t_c >= 2) = 1 > 5/6 > 3/4
    assert planner.start_seconds(remaining, 0.49, 1.0) is None
    assert planner.start_seconds(remaining, 1.0, 7.0) == 0.0
    assert PrewarmPlanner(0.25).start_seconds(remaining, 1.0, 1.0) == 7.0
    assert planner.start_seconds(remaining.condition(3.0), 1.0, 1.0) == 2.0  # 1, 3, 5 left


def test_planning_anew_puts_the_start_off_for_ever_where_there_is_no_memory():
    """Why a plan stands: an exponential unit is as far from its end at any age."""
    exponential = Distribution(-np.log1p(-np.arange(1, 2000) / 2000) * 10.0)
    planner = PrewarmPlanner(0.5)
    starts = [planner.start_seconds(exponential.condition(age), 1.0, 2.0) for age in (0, 5, 10, 20)]
    assert all(start == pytest.approx(10 * np.log(2) - 2, rel=0.02) for start in starts)


@given(distributions(), probabilities, warm_ups, st.floats(0.1, 5.0), st.floats(0.0, 3.0))
def test_the_best_start_is_the_best_of_all(remaining, probability, warm_seconds, footprint, price):
    planner = CostAwarePlanner(price)
    successor = Successor("next", probability, warm_seconds, footprint)
    start, value = planner.best_start(remaining, successor)
    assert value == pytest.approx(planner.value(remaining, successor, start), abs=1e-9)
    scale = 1e-9 * (1 + remaining.values[-1] * (1 + price * footprint))
    for other in np.linspace(0.0, remaining.values[-1] * 1.1, 200):
        assert planner.value(remaining, successor, float(other)) <= value + scale


def test_value_by_hand():
    planner = CostAwarePlanner(idle_price=0.5)
    remaining = Distribution([4.0, 10.0])
    sure = Successor("next", 1.0, 3.0)
    # At 1: saved 3 s; idle 0 or 6 s.
    assert planner.value(remaining, sure, 1.0) == 3.0 - 0.5 * 3.0
    # At 7: too late half of the time, just in time else.
    assert planner.value(remaining, sure, 7.0) == 1.5
    unsure = Successor("next", 0.5, 3.0, footprint=2.0)
    # Saved 1.5 s; held 0 or 6 s idle, and 3 s of warming for nothing half of the time.
    assert planner.value(remaining, unsure, 1.0) == 1.5 - 0.5 * 2.0 * (3.0 + 1.5)
    assert planner.best_start(remaining, sure) == (7.0, 1.5)  # the later of two that are best


items = st.lists(
    st.tuples(st.floats(0.05, 1.0), st.floats(0.5, 9.0), st.floats(0.2, 4.0)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(distributions(), items, st.floats(0.0, 8.0), st.floats(0.0, 0.5))
def test_greedy_gets_at_least_half_of_the_knapsack(remaining, items, capacity, price):
    planner = CostAwarePlanner(price)
    successors = [Successor(str(n), p, t, f) for n, (p, t, f) in enumerate(items)]
    best = {s.unit: planner.best_start(remaining, s) for s in successors}
    weight = {s.unit: s.footprint for s in successors}
    chosen = planner.plan(remaining, successors, capacity)
    assert sum(weight[start.unit] for start in chosen) <= capacity + 1e-9
    assert all(start.seconds == best[start.unit][0] for start in chosen)
    assert [start.seconds for start in chosen] == sorted(start.seconds for start in chosen)
    got = sum(best[start.unit][1] for start in chosen)
    optimum = max(
        sum(best[s.unit][1] for s in subset)
        for size in range(len(successors) + 1)
        for subset in combinations(successors, size)
        if sum(s.footprint for s in subset) <= capacity
    )
    assert got >= optimum / 2 - 1e-9
    same = [Successor(s.unit, s.probability, s.warm_seconds, 1.0) for s in successors]
    best = {s.unit: planner.best_start(remaining, s)[1] for s in same}
    got = sum(best[start.unit] for start in planner.plan(remaining, same, capacity))
    worth = sorted((max(value, 0.0) for value in best.values()), reverse=True)
    assert got == pytest.approx(sum(worth[: int(capacity)]), abs=1e-9)


def test_baselines():
    remaining = Distribution([2.0, 4.0, 6.0, 8.0])
    likely, rare = Successor("likely", 0.7, 1.0), Successor("rare", 0.1, 1.0)
    assert NoPrewarm().plan(remaining, [likely, rare], 9.0) == []
    assert WaitingQueue().plan(remaining, [likely, rare], 9.0) == []
    assert NoPrewarm().at_submission is False
    assert WaitingQueue().at_submission is True
    assert AlwaysAtStart().plan(remaining, [rare, likely], 1.0) == [Start("likely", 0.0)]
    assert AlwaysAtStart().plan(remaining, [rare, likely], 2.0) == [
        Start("likely", 0.0), Start("rare", 0.0)
    ]  # fmt: skip
    certain = Successor("next", 1.0, 3.0)
    assert OraclePrewarm().plan(Distribution([8.0]), [certain], 1.0) == [Start("next", 5.0)]
    assert OraclePrewarm().plan(Distribution([8.0]), [certain], 0.5) == []
    # 0.1 / 0.7 of the units are over by 2 s; the rare one is never likely enough by the median.
    assert ArtifactPrewarm(0.1).plan(remaining, [likely], 9.0) == [Start("likely", 1.0)]
    assert ArtifactPrewarm(0.6).plan(remaining, [rare, likely], 9.0) == [Start("likely", 7.0)]
    assert ArtifactPrewarm(0.1, 0.3).plan(remaining, [likely], 9.0) == [Start("likely", 1.7)]
    assert PrewarmPlanner(0.5).plan(remaining, [rare, likely], 9.0) == [Start("likely", 3.0)]


@given(distributions(), probabilities, warm_ups, thresholds, thresholds)
def test_the_artifact_goes_the_other_way(remaining, probability, warm_seconds, low, high):
    low, high = sorted((low, high))
    successor = [Successor("next", probability, warm_seconds)]
    late = ArtifactPrewarm(high).plan(remaining, successor, 1.0)
    if late:
        early = ArtifactPrewarm(low).plan(remaining, successor, 1.0)
        assert early[0].seconds <= late[0].seconds


WRITE, TEST, ASK = Unit("write", "llm"), Unit("test", "container"), Unit("ask", "llm")


def graph():
    run = [Execution(WRITE, 0, 10), Execution(TEST, seconds=1.0)]
    return PDGraph.fit(
        [run, run, run, [Execution(WRITE, 0, 10), Execution(ASK, 0, 1)]], name="code"
    )


def test_a_user_s_backends_are_driven_by_the_clock():
    calls = []
    backend = CallbackBackend(
        4.0,
        on_warm=lambda job, unit: calls.append(("warm", job, unit)),
        on_release=lambda job, unit: calls.append(("release", job, unit)),
    )
    prewarming = Prewarming(
        PrewarmPlanner(0.5), {"code": graph()}, {"container": backend}, CostModel(0.0, 1.0)
    )
    prewarming.unit_started("a", "code", "write", now=100.0)
    assert prewarming.next_second == 106.0
    assert prewarming.tick(105.9) == []
    assert prewarming.tick(106.0) == [("a", "test")]
    assert calls == [("warm", "a", "test")]
    assert prewarming.unit_finished("a", "test")
    assert prewarming.next_second == float("inf")
    prewarming.unit_started("b", "code", "write", now=200.0, elapsed_seconds=5.0)
    prewarming.unit_started("c", "code", "write", now=200.0)
    assert prewarming.tick(201.0) == [("b", "test")]
    assert not prewarming.unit_finished("b", "ask")
    assert not prewarming.unit_finished("c", "test")  # over before its start was due
    assert prewarming.tick(300.0) == []
    assert calls[1:] == [("warm", "b", "test"), ("release", "b", "test")]


def test_capacity_is_shared_by_all_jobs():
    backend = CallbackBackend(10.0, on_warm=lambda job, unit: None)
    prewarming = Prewarming(
        AlwaysAtStart(), {"code": graph()}, {"test": backend}, CostModel(0.0, 1.0), capacity=1.0
    )
    for job in "ab":
        prewarming.unit_started(job, "code", "write", now=0.0)
    assert prewarming.tick(0.0) == [("a", "test")]
    prewarming.unit_finished("a", "end")
    prewarming.unit_started("c", "code", "write", now=1.0)
    assert prewarming.tick(1.0) == [("c", "test")]


def driven(capacity=float("inf"), on_release=None, prewarmer=AlwaysAtStart()):  # noqa: B008
    calls = []

    def release(job, unit):
        calls.append(("release", unit))
        if on_release:
            on_release(unit)

    backend = CallbackBackend(1.0, lambda job, unit: calls.append(("warm", unit)), release)
    backends = {"test": backend, "ask": backend}
    cost = CostModel(0.0, 1.0)
    return Prewarming(prewarmer, {"code": graph()}, backends, cost, capacity), calls


def test_a_unit_said_to_start_twice_is_warmed_for_once():
    prewarming, calls = driven(capacity=4.0)
    for now in (0.0, 1.0, 2.0):
        prewarming.unit_started("a", "code", "write", now=now)
        prewarming.tick(now)
    assert sorted(calls) == [("warm", "ask"), ("warm", "test")]
    prewarming.unit_finished("a", "end")
    for job in "bc":
        prewarming.unit_started(job, "code", "write", now=3.0)
    assert len(prewarming.tick(3.0)) == 4  # all of the capacity is back
    # What was not warm yet is planned anew, and once.
    prewarming, calls = driven(prewarmer=PrewarmPlanner(0.5))
    prewarming.unit_started("a", "code", "write", now=0.0)
    prewarming.unit_started("a", "code", "write", now=1.0)
    assert prewarming.tick(9.5) == []
    assert prewarming.tick(10.0) == [("a", "test")]


def test_a_release_that_fails_does_not_keep_the_others():
    def fail(unit):
        raise RuntimeError(f"no release of {unit}")

    prewarming, calls = driven(capacity=2.0, on_release=fail)
    prewarming.unit_started("a", "code", "write", now=0.0)
    prewarming.tick(0.0)
    with pytest.raises(RuntimeError, match="no release of"):
        prewarming.unit_finished("a", "end")
    assert sorted(calls[2:]) == [("release", "ask"), ("release", "test")]
    prewarming.unit_started("b", "code", "write", now=1.0)
    assert len(prewarming.tick(1.0)) == 2


def test_clocks_that_make_no_sense_change_nothing():
    prewarming, _ = driven(prewarmer=PrewarmPlanner(0.5))
    prewarming.unit_started("a", "code", "write", now=5.0)
    for now in (4.0, float("nan"), float("inf"), -float("inf")):
        with pytest.raises(DemandError, match=r"finite seconds that never go back"):
            prewarming.unit_started("a", "code", "write", now=now)
        with pytest.raises(DemandError, match=r"now is .* s after 5\.0 s"):
            prewarming.tick(now)
    for elapsed in (-1.0, float("nan")):
        with pytest.raises(DemandError, match="age is"):
            prewarming.unit_started("a", "code", "write", now=6.0, elapsed_seconds=elapsed)
    assert prewarming.next_second == 14.0
    assert prewarming.tick(14.0) == [("a", "test")]  # the first plan stands


def test_a_unit_that_outlives_every_sample_has_as_much_left_as_the_tail_rule_says():
    prewarming, _ = driven(prewarmer=PrewarmPlanner(0.5))
    prewarming.unit_started("a", "code", "write", now=0.0, elapsed_seconds=25.0)
    assert prewarming.next_second == 20.0 - 1.0  # samples of 10 s, doubled to 20


def test_chunks_of_a_store_are_prefetched_without_importing_it():
    """`store` has what picache's ChunkStore has: promote(key, device) brings a chunk there."""

    class Store:
        def __init__(self):
            self.fetched = []

        def promote(self, key, device):
            self.fetched.append((key, device))
            return True

    store, chunks = Store(), {"a": ["doc-1", "doc-2"]}

    def fetch(job, unit):
        for key in chunks[job]:
            store.promote(key, "cuda")

    prewarming = Prewarming(
        PrewarmPlanner(0.2), {"code": graph()}, {"ask": CallbackBackend(0.5, fetch)}
    )
    prewarming.unit_started("a", "code", "write", now=0.0)
    assert prewarming.next_second == pytest.approx(10 * 0.06 - 0.5)
    prewarming.tick(1.0)
    assert store.fetched == [("doc-1", "cuda"), ("doc-2", "cuda")]


def test_bad_input_is_refused():
    for threshold in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(DemandError, match="expected 0 < K < 1"):
            PrewarmPlanner(threshold)
        with pytest.raises(DemandError, match="expected 0 < threshold < 1"):
            ArtifactPrewarm(threshold)
    known = Distribution([1.0])
    with pytest.raises(DemandError, match=r"warm-up takes -1.0 s"):
        PrewarmPlanner().start_seconds(known, 0.9, -1.0)
    with pytest.raises(DemandError, match=r"probability is 1.5; expected 0 to 1"):
        PrewarmPlanner().start_seconds(known, 1.5, 1.0)
    with pytest.raises(DemandError, match=r"warm-up takes nan s"):
        Successor("next", 0.5, float("nan"))
    with pytest.raises(DemandError, match="follows with probability 2"):
        Successor("next", 2.0, 1.0)
    with pytest.raises(DemandError, match="footprint of unit 'next' is 0"):
        Successor("next", 1.0, 1.0, 0.0)
    with pytest.raises(DemandError, match=r"idle_price is -0.1"):
        CostAwarePlanner(-0.1)
    with pytest.raises(DemandError, match="slack_seconds is -1"):
        ArtifactPrewarm(0.1, -1.0)
    with pytest.raises(DemandError, match=r"warm-up takes -2 s"):
        CallbackBackend(-2, lambda job, unit: None)
    for capacity in (-1.0, float("nan")):
        with pytest.raises(DemandError, match=f"capacity is {capacity}; expected at least 0"):
            Prewarming(PrewarmPlanner(), {}, {}, capacity=capacity)
    with pytest.raises(DemandError, match="needs the truth"):
        Prewarming(OraclePrewarm(), {}, {})
    with pytest.raises(DemandError, match="application 'chat' has no graph; expected one of code"):
        Prewarming(PrewarmPlanner(), {"code": graph()}, {}).unit_started("a", "chat", "x", 0.0)
