"""The figures of a result, on jobs small enough to work out by hand."""

import json
import math

import numpy as np
import pytest

from demand import FCFS, DemandError, Distribution, Gittins, Oracle, Workload, bimodal_mix, simulate
from demand.simulation.metrics import jain_index

KNOWN = {"a": Distribution([4.0]), "b": Distribution([1.0])}


def by_hand():
    """`a` for 4 s; `b` twice for 1 s, behind it: they finish after 4, 4 and 4 seconds."""
    return Workload([0.0, 1.0, 2.0], [4.0, 1.0, 1.0], "abb", KNOWN, deadlines=[math.inf, 5.0, 5.9])


def test_the_figures_by_hand():
    result = simulate(by_hand(), FCFS())
    assert result.completion_times.tolist() == [4.0, 4.0, 4.0]
    assert (result.mean, result.quantile(0.5), result.quantile(0.99)) == (4.0, 4.0, 4.0)
    assert result.slowdowns.tolist() == [1.0, 4.0, 4.0]
    assert result.jain == pytest.approx((1 + 0.25 + 0.25) ** 2 / (3 * (1 + 0.0625 + 0.0625)))
    assert result.deadline_hits == 0.5  # met at 5, missed at 5.9
    assert {name: times.tolist() for name, times in result.by_application().items()} == {
        "a": [4.0],
        "b": [4.0, 4.0],
    }
    assert result.summary() == {
        "mean_seconds": 4.0,
        "p50_seconds": 4.0,
        "p95_seconds": 4.0,
        "p99_seconds": 4.0,
        "mean_slowdown": 3.0,
        "p99_slowdown": pytest.approx(4.0),
        "jain": pytest.approx(result.jain),
        "deadline_hits": 0.5,
        "preemptions": 0,
    }
    json.dumps(result.summary())


def test_serving_the_short_first_is_seen_in_every_figure():
    plain, oracle = simulate(by_hand(), FCFS()), simulate(by_hand(), Oracle())
    assert oracle.completion_times.tolist() == [6.0, 1.0, 1.0]
    assert oracle.mean < plain.mean
    assert oracle.jain > plain.jain
    assert oracle.deadline_hits == 1.0
    assert oracle.preemptions == 1


def test_quantiles_are_those_of_numpy():
    result = simulate(bimodal_mix(0.8, 300, seed=4), Gittins())
    for q in (0.5, 0.95, 0.99):
        assert result.quantile(q) == np.quantile(result.completion_times, q)


def test_jobs_without_demand_have_no_slowdown():
    workload = Workload([0.0, 0.0], [2.0, 0.0], "ab", KNOWN)
    result = simulate(workload, FCFS())
    assert result.completion_times.tolist() == [2.0, 2.0]
    assert result.slowdowns[0] == 1.0
    assert math.isnan(result.slowdowns[1])
    assert result.jain == 1.0
    assert result.summary()["mean_slowdown"] == 1.0


def test_where_no_job_has_a_demand_what_divides_by_it_is_nan():
    result = simulate(Workload([0.0, 1.0], [0.0, 0.0], "ab", KNOWN), FCFS())
    found = result.summary()
    assert found["mean_seconds"] == found["p99_seconds"] == 0.0
    assert all(math.isnan(found[name]) for name in ("mean_slowdown", "p99_slowdown", "jain"))


def test_a_quantile_is_a_share():
    for q in (2, -0.1, math.nan):
        with pytest.raises(DemandError, match=f"q is {q}; expected a share"):
            simulate(by_hand(), FCFS()).quantile(q)


@pytest.mark.parametrize("bad", [math.nan, "x", None], ids=str)
def test_priorities_are_numbers(bad):
    with pytest.raises(DemandError, match=f"priorities have {bad!r}; expected numbers"):
        Workload([0.0, 1.0], [1.0, 1.0], "ab", KNOWN, priorities=[0, bad])


def test_an_application_without_a_distribution_has_a_remedy():
    with pytest.raises(DemandError, match=r"\['c'\] have no distribution.*NEVER_SEEN"):
        Workload([0.0], [1.0], "c", KNOWN)


@pytest.mark.parametrize("count", [0, 1.5, math.nan])
def test_jobs_and_servers_are_whole(count):
    for name in ("jobs", "servers"):
        with pytest.raises(DemandError, match=f"{name} is {count}; expected a whole number"):
            bimodal_mix(0.8, **{"jobs": 10, name: count})


def test_without_deadlines_there_is_no_share_of_hits():
    assert math.isnan(simulate(bimodal_mix(0.8, 20), FCFS()).deadline_hits)


def test_jains_index():
    assert jain_index([3.0, 3.0, 3.0]) == 1.0
    assert jain_index([5.0, 0.0, 0.0, 0.0]) == 0.25
    assert jain_index([1.0, 2.0]) == pytest.approx(0.9)
    assert jain_index([0.0, 0.0]) == 1.0
    for shares in ([], [-1.0], [math.nan], [math.inf], [[1.0]]):
        with pytest.raises(DemandError, match="shares have shape"):
            jain_index(shares)


def test_results_cannot_be_changed():
    result = simulate(by_hand(), FCFS())
    with pytest.raises(ValueError, match="read-only"):
        result.completion_times[0] = 0.0
