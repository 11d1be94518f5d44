import numpy as np
import pytest

from demand import DemandError, bootstrap_interval, paired_ratio_interval


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(10.0, 2.0, 100)
    found = bootstrap_interval(values)
    assert found.estimate == pytest.approx(values.mean())
    half = 1.96 * values.std() / 10
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert bootstrap_interval(values) == found
    assert bootstrap_interval(values, confidence=0.5).high < found.high


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        found = bootstrap_interval(rng.exponential(size=60), resamples=400, seed=trial)
        covered += found.low <= 1.0 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_pairing_takes_out_what_both_share():
    rng = np.random.default_rng(2)
    luck = rng.lognormal(size=30)
    ours, baseline = 0.5 * luck * rng.uniform(0.98, 1.02, 30), luck
    found = paired_ratio_interval(ours, baseline)
    assert found.estimate == pytest.approx(0.5, abs=0.005)
    assert found.low < found.estimate < found.high < found.low + 0.01
    alone = bootstrap_interval(ours)
    assert alone.high - alone.low > 0.2 * alone.estimate


def test_bad_input_is_refused():
    for values in ([], [1.0], [1.0, np.nan], [[1.0, 2.0]]):
        with pytest.raises(DemandError, match="replications have shape"):
            bootstrap_interval(values)
    for zero in (0.0, -2.0):
        with pytest.raises(DemandError, match=f"baseline has the replication {zero}"):
            paired_ratio_interval([1.0, 2.0], [1.0, zero])
    with pytest.raises(DemandError, match="pair them seed by seed"):
        paired_ratio_interval([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(DemandError, match="confidence is 95"):
        bootstrap_interval([1.0, 2.0], confidence=95)
    with pytest.raises(DemandError, match="resamples is 0"):
        bootstrap_interval([1.0, 2.0], resamples=0)
