import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demand import DemandError, Execution, PDGraph, Unit
from demand.graph.drift import drift, kolmogorov_smirnov

FETCH, WORK = Unit("fetch", "search"), Unit("work", "tool")


def runs(rng, n, work=10.0, fetch=2.0):
    return [
        [
            Execution(FETCH, seconds=rng.exponential(fetch)),
            Execution(WORK, seconds=rng.exponential(work)),
        ]
        for _ in range(n)
    ]


@pytest.mark.parametrize(("m", "n", "shift"), [(30, 40, 0.2), (100, 900, 0.1), (50, 50, 1.0)])
def test_ks_agrees_with_scipy(m, n, shift):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(m)
    for _ in range(20):
        x, y = rng.normal(size=m), rng.normal(shift, size=n)
        statistic, p = kolmogorov_smirnov(x, y)
        exact = stats.ks_2samp(x, y, method="exact")
        assert statistic == pytest.approx(exact.statistic)
        assert p == pytest.approx(exact.pvalue, rel=0.35, abs=0.02)
        assert p == pytest.approx(stats.ks_2samp(x, y, method="asymp").pvalue, abs=0.02)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=40),
    st.lists(st.integers(0, 9), min_size=1, max_size=40),
)
def test_ks_of_ties_agrees_with_the_definition(x, y):
    twin = max(abs(np.mean(np.array(x) <= v) - np.mean(np.array(y) <= v)) for v in range(10))
    statistic, p = kolmogorov_smirnov(x, y)
    assert statistic == pytest.approx(twin)
    assert 0.0 <= p <= 1.0
    assert kolmogorov_smirnov(y, x) == (statistic, p)


def test_what_changed_is_named():
    rng = np.random.default_rng(0)
    graph = PDGraph.fit([*runs(rng, 400), *runs(rng, 100, fetch=6.0)])
    report = drift(graph, recent=100)
    assert "fetch" in report.drifted
    assert "work" not in report.drifted
    assert (report.older, report.recent) == (400, 100)
    fetch = next(test for test in report.tests if test.what == "fetch")
    assert fetch.older_mean == pytest.approx(2.0, rel=0.2)
    assert fetch.recent_mean == pytest.approx(6.0, rel=0.2)
    assert [test.what for test in report.tests] == ["run", "fetch", "work"]
    assert "drifted" in str(report)
    assert "100 recent runs against 400 older ones" in str(report)


def test_a_unit_that_is_new_has_drifted():
    rng = np.random.default_rng(0)
    with_human = [[*run, Execution(Unit("ask", "human"), seconds=30.0)] for run in runs(rng, 50)]
    report = drift(PDGraph.fit([*runs(rng, 200), *with_human]), recent=50)
    assert set(report.drifted) == {"run", "ask"}


def test_false_alarms_are_as_rare_as_stated():
    """At most 5 % of the looks at an application that does not change; 0.07 allows for chance."""
    rng = np.random.default_rng(1)
    alarms = [
        bool(drift(PDGraph.fit(runs(rng, 150)), recent=50, false_alarm_rate=0.05).drifted)
        for _ in range(200)
    ]
    assert np.mean(alarms) <= 0.07


def test_bad_input_is_refused():
    rng = np.random.default_rng(0)
    graph = PDGraph.fit(runs(rng, 10))
    for recent in (0, 10, 100):
        with pytest.raises(DemandError, match=f"recent is {recent} of 10 remembered runs"):
            drift(graph, recent)
    with pytest.raises(DemandError, match=r"false_alarm_rate is 1\.0"):
        drift(graph, 5, false_alarm_rate=1.0)
    with pytest.raises(DemandError, match="0 and 1 entries"):
        kolmogorov_smirnov([], [1.0])
    with pytest.raises(DemandError, match="expected at least one number each"):
        kolmogorov_smirnov([np.nan], [1.0])


def test_an_unknown_way_to_count_is_refused():
    unit = Unit("a", "tool")
    graph = PDGraph.fit([[Execution(unit, seconds=1.0)]] * 5)
    with pytest.raises(DemandError, match="parallel_calls is 'x'"):
        drift(graph, recent=2, parallel_calls="x")
