"""Time to first token, times between tokens, goodput and KV-seconds, beside all tokens."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import FCFS, DemandError, Distribution, Execution, Gittins, Oracle, Unit, Workload
from demand.policies import LAS
from demand.simulation.engine import Engine, Pool, simulate_engine
from demand.simulation.engine.weighted_quantiles import weighted_quantiles
from tests.demand.engine_twin import step_by_step
from tests.demand.test_engine import (
    THINK,
    WHOLE_COST,
    engines_and_policies,
    like_vllm_and_policies,
    one_unit,
    workloads,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def gaps_of(call):
    return np.diff(call.token_seconds)


def check_against_every_token(result, twin, q, bound):
    """All figures of the requests, from the second of each token and the blocks at each step."""
    requests, calls = result.requests, twin.calls
    assert len(requests) == len(calls)
    for name, expected in (
        ("job", [c.entry.job.index for c in calls]),
        ("unit", [c.unit for c in calls]),
        ("call", [c.number for c in calls]),
        ("tokens", [c.made for c in calls]),
    ):
        assert getattr(requests, name).tolist() == expected, name
    nan = float("nan")
    for name, expected in (
        ("requested", [c.requested for c in calls]),
        ("finished", [c.token_seconds[-1] for c in calls]),
        ("ttft", [c.token_seconds[0] - c.requested for c in calls]),
        ("tpot", [gaps_of(c).mean() if c.made > 1 else nan for c in calls]),
        ("kv_block_seconds", [c.block_seconds for c in calls]),
    ):
        np.testing.assert_allclose(getattr(requests, name), expected, **CLOSE, err_msg=name)
    own = [np.quantile(gaps_of(c), q) if c.made > 1 else nan for c in calls]
    np.testing.assert_allclose(requests.tbt(q), own, **CLOSE)
    for row in requests.table:
        mine = [c for c in calls if row["application"] in ("all", c.entry.job.application)]
        assert row["requests"] == len(mine)
        assert row["tokens"] == sum(c.made for c in mine)
        waits = [c.token_seconds[0] - c.requested for c in mine]
        gaps = np.concatenate([[], *map(gaps_of, mine)])
        for percent in (50, 95, 99):
            for name, numbers in (("ttft", waits), ("tbt", gaps)):
                expected = np.percentile(numbers, percent) if len(numbers) else nan
                np.testing.assert_allclose(row[f"p{percent}_{name}_seconds"], expected, **CLOSE)
        held = sum(c.block_seconds for c in mine)
        np.testing.assert_allclose(row["kv_block_seconds"], held, **CLOSE)
    # Off all sums of the times, so that no rounding decides.
    met = [c.token_seconds[0] - c.requested <= bound and (gaps_of(c) <= bound).all() for c in calls]
    assert requests.within(ttft=bound, tbt=bound).tolist() == met
    slow = {c.entry.job.index for c, good in zip(calls, met, strict=True) if not good}
    finished = result.workload.arrivals + twin.completion_times
    jobs = [i not in slow and end <= result.workload.deadlines[i] for i, end in enumerate(finished)]
    seconds = finished.max() - result.workload.arrivals[0]
    if seconds:
        rates = sum(met) / seconds, sum(jobs) / seconds
        assert result.goodput(ttft=bound, tbt=bound)[:2] == pytest.approx(rates)


bounds = st.integers(1, 60).map(lambda n: n / 2 + 1 / 1024 + 1e-4)


@settings(max_examples=150, deadline=None)
@given(workloads(), engines_and_policies | like_vllm_and_policies, st.floats(0.0, 1.0), bounds)
def test_figures_are_those_of_every_token(workload, served, q, bound):
    engine, policy = served
    result = simulate_engine(workload, policy, engine, cost=WHOLE_COST)
    twin = step_by_step(workload, policy, engine, WHOLE_COST)
    check_against_every_token(result, twin, q, bound)


@settings(max_examples=60, deadline=None)
@given(workloads(), engines_and_policies | like_vllm_and_policies)
def test_laws(workload, served):
    """First token and gaps add up to the whole; KV-seconds are held blocks over time."""
    engine, policy = served
    result = simulate_engine(workload, policy, engine, cost=WHOLE_COST)
    requests = result.requests
    between = np.nan_to_num(requests.tpot) * (requests.tokens - 1)
    np.testing.assert_allclose(requests.ttft + between, requests.finished - requests.requested)
    assert (requests.ttft > 0.0).all()
    ends = np.zeros(len(workload))  # of each job's last unit
    np.maximum.at(ends, requests.job, requests.finished)
    done = workload.arrivals + result.completion_times
    assert (ends <= done + 1e-9).all()
    for i, run in enumerate(workload.runs):
        if run[-1].unit.kind == "llm":
            assert ends[i] == pytest.approx(done[i])
    assert result.kv_block_seconds <= result.peak_blocks * result.busy_seconds + 1e-9
    low, high = (requests.tbt(q) for q in (0.0, 1.0))
    several = requests.tokens > 1
    assert (low[several] <= requests.tpot[several] + 1e-9).all()
    assert (requests.tpot[several] <= high[several] + 1e-9).all()
    everything = result.goodput()
    assert everything.request_share == 1.0 or not len(requests)


def test_one_unit_jobs_wait_for_a_first_token_and_then_for_the_others():
    workload = one_unit([(5, 7), (3, 4), (9, 1)], arrivals=[0.0, 0.5, 2.0])
    result = simulate_engine(workload, Gittins(), Engine(max_requests=2))
    requests = result.requests
    gaps = np.nan_to_num(requests.tpot) * (requests.tokens - 1)
    np.testing.assert_allclose(requests.ttft + gaps, result.completion_times)


def test_figures_by_hand():
    """Budget 4: the first prompt takes three steps, and decodes beside the rest of the second."""
    workload = Workload(
        [0, 1], [1, 1], "ab", {name: Distribution([1.0]) for name in "ab"}, deadlines=[6.0, 3.5],
        runs=[[Execution(THINK, 10, 3)], [Execution(THINK, 5, 1)]],
    )  # fmt: skip
    engine = Engine.counting_steps(8, token_budget=4, block_tokens=4)
    result = simulate_engine(workload, FCFS(), engine)
    # Steps: 4 | 4 | 2 + 2 | 1 decodes + 3, over | 1 decodes, over
    requests = result.requests
    assert requests.ttft.tolist() == [3.0, 3.0]
    assert requests.tbt(0.5).tolist()[0] == requests.tpot[0] == 1.0
    assert math.isnan(requests.tpot[1])
    assert math.isnan(requests.tbt_quantile(0.5, "b"))
    assert requests.kv_block_seconds.tolist() == [1 + 2 + 3 + 3 + 3, 1 + 2]
    assert result.kv_block_seconds == 15
    assert result.goodput(ttft=3.0, tbt=1.0) == (2 / 5, 1 / 5, 1.0, 0.5)  # b is late: 4 > 3.5
    assert result.goodput(ttft=2.9) == (0.0, 0.0, 0.0, 0.0)
    assert requests.within(tpot=0.5).tolist() == [False, True]
    assert [row["application"] for row in requests.table] == ["all", "a", "b"]
    assert result.summary()["p99_ttft_seconds"] == 3.0
    assert result.summary()["kv_block_seconds"] == 15
    json.dumps(requests.table)


def test_being_preempted_is_a_gap():
    workload = one_unit([(4, 10), (4, 2)], arrivals=[0, 5])
    result = simulate_engine(
        workload, Oracle(), Engine.counting_steps(1, block_tokens=4), cost=WHOLE_COST
    )
    assert result.requests.tbt(1.0).tolist() == [3.0, 1.0]
    assert result.requests.tbt(0.5).tolist() == [1.0, 1.0]
    # 4 tokens in the first step, 5 to 8 in the next four, 8 in the two it is paused, 9 to 13.
    assert result.requests.kv_block_seconds.tolist() == [1 + 2 * 4 + 2 * 2 + 3 * 4 + 4, 1 + 2]


def test_a_cold_backend_is_waited_for_before_the_first_token():
    result = simulate_engine(
        one_unit([(1, 2)]), FCFS(), Engine.counting_steps(1), backends={"llm": Pool(1, 7.0)}
    )
    assert result.requests.requested.tolist() == [0.0]
    assert result.requests.ttft.tolist() == [8.0]


@pytest.mark.parametrize("kv_seconds", [0.0, 1e-6])
@pytest.mark.parametrize(
    ("scheduling", "mode"),
    [
        ("by_rank", "pause"),
        ("by_rank", "recompute"),
        ("by_rank", "swap"),
        ("running_first", "none"),
        ("running_first", "recompute"),
    ],
)
def test_a_crowded_engine(scheduling, mode, kv_seconds):
    rng = np.random.default_rng(3)
    tokens = [(int(i), int(o)) for i, o in rng.integers(1, 200, (30, 2))]
    workload = one_unit(tokens, arrivals=np.sort(rng.random(30) * 20).tolist())
    engine = Engine(
        6, 64, 60, preemption=mode, kv_seconds_per_token=kv_seconds, scheduling=scheduling
    )
    policy = LAS(3.0)
    result = simulate_engine(workload, policy, engine)
    check_against_every_token(result, step_by_step(workload, policy, engine), 0.9, 0.12345)


def test_some_requests_at_a_time(monkeypatch):
    workload = one_unit([(3, 50), (4, 1), (2, 20), (6, 33)], arrivals=[0, 1, 2, 3])
    result = simulate_engine(workload, LAS(3.0), Engine(max_requests=2))
    expected = result.requests.tbt(0.7)
    monkeypatch.setattr("demand.simulation.engine.served_requests.SPREAD", 1)
    np.testing.assert_array_equal(result.requests.tbt(0.7), expected)


def test_jobs_without_requests():
    run = [Execution(Unit("test", "container"), seconds=2.0)]
    workload = Workload([0.0], [2.0], "a", {"a": Distribution([2.0])}, runs=[run])
    result = simulate_engine(workload, FCFS())
    assert len(result.requests) == 0
    assert result.kv_block_seconds == 0.0
    assert math.isnan(result.requests.ttft_quantile(0.5))
    assert math.isnan(result.requests.tbt_quantile(0.5))
    assert result.goodput()[:2] == (0.0, 0.5)
    assert "all" in repr(result.requests)
    result.requests.figure("tbt")


def test_what_is_not_to_be_had_is_refused():
    requests = simulate_engine(one_unit([(1, 2)]), FCFS()).requests
    with pytest.raises(DemandError, match="q is 2; expected a share"):
        requests.tbt(2)
    with pytest.raises(DemandError, match="application is 'x'; served were a"):
        requests.ttft_quantile(0.5, "x")
    with pytest.raises(DemandError, match="ttft is -1; expected seconds of at least 0"):
        requests.within(ttft=-1)
    with pytest.raises(DemandError, match="of is 'itl'; expected one of ttft, tbt"):
        requests.figure("itl")


def test_the_report_reads():
    requests = simulate_engine(one_unit([(5, 4)]), FCFS(), Engine.counting_steps(2)).requests
    lines = repr(requests).splitlines()
    assert (
        lines[0].split()
        == (
            "application requests tokens p50 ttft p95 ttft p99 ttft p50 tbt p95 tbt p99 tbt "
            "kv block"
        ).split()
    )
    assert lines[1].split() == ["all", "1", "4", "1", "1", "1", "1", "1", "1", "4"]


@pytest.mark.parametrize("of", ["ttft", "tbt"])
def test_a_figure_has_a_line_an_application(of):
    runs = [[Execution(THINK, 5, 4)]] * 2
    known = {name: Distribution([1.0]) for name in "ab"}
    workload = Workload([0, 0], [1, 1], "ba", known, runs=runs)
    drawn = simulate_engine(workload, FCFS(), Engine(max_requests=1)).requests.figure(of)
    assert [line.get_label() for line in drawn.lines] == ["a", "b"]
    assert all(line.get_ydata()[-1] == 1.0 for line in drawn.lines)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 4)), max_size=20),
    st.floats(0.0, 1.0),
)
def test_weighted_quantiles_are_those_of_the_numbers_written_out(entries, q):
    columns = np.array(entries, dtype=np.int64).reshape(-1, 3)
    labels, values, counts = columns[:, 0], columns[:, 1].astype(float), columns[:, 2]
    found = weighted_quantiles(labels, values, counts, q, 4)
    for label in range(4):
        own = labels == label
        written = np.repeat(values[own], counts[own])
        expected = np.quantile(written, q) if written.size else np.nan
        np.testing.assert_allclose(found[label], expected, atol=1e-9)
