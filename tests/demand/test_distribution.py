import numpy as np
import pytest
from hypothesis import given

from demand import DemandError, Distribution
from tests.demand.strategies import aged


def test_atoms_are_sorted_merged_and_normalised():
    d = Distribution([3, 1, 3, 2], [1, 1, 2, 4])
    assert d.values.tolist() == [1, 2, 3]
    assert d.weights.tolist() == [0.125, 0.5, 0.375]
    assert len(d) == 3
    assert d == Distribution([1, 2, 3], [1, 4, 3])
    assert hash(d) == hash(Distribution([1, 2, 3], [1, 4, 3]))
    assert d != Distribution([1, 2, 3])


def test_it_cannot_be_changed():
    source = np.array([1.0, 2.0])
    d = Distribution(source)
    source[0] = 9.0
    assert d.values[0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        d.values[0] = 5.0
    with pytest.raises(AttributeError):
        d.values = source


def test_moments_and_quantiles_by_hand():
    d = Distribution([1, 2, 3, 10])
    assert d.mean() == 4.0
    assert d.mean(1.0) == 4.0  # (1 + 2 + 9) / 3
    assert d.mean(2.5) == 4.0  # (0.5 + 7.5) / 2
    assert [d.quantile(q) for q in (0, 0.25, 0.26, 0.5, 0.95, 1)] == [1, 1, 2, 2, 10, 10]
    assert d.quantile(0.5, age=2.0) == 1.0
    assert [d.survival(a) for a in (0, 1, 1.5, 10, 99)] == [1, 0.75, 0.75, 0, 0]
    assert d.condition(2.0) == Distribution([1, 8])


def test_quantile_on_a_step_is_not_lost_to_rounding():
    d = Distribution(np.arange(1, 11))
    assert [d.quantile(k / 10) for k in range(1, 11)] == list(range(1, 11))


def test_beyond_the_largest_sample_the_rest_doubles_and_is_never_0():
    d = Distribution([1, 4])
    ages = [4, 7.9, 8, 15, 16, 1e9]
    rest = [4, 4, 8, 8, 16, 4 * 2.0**27]
    for rule in (d.mean, d.gittins, lambda a: d.quantile(0.5, a), lambda a: d.condition(a).mean()):
        assert [rule(a) for a in ages] == rest
    assert all(age / 2 < r <= age for age, r in zip(ages, rest, strict=True))


def test_all_samples_zero_still_gives_a_positive_rest():
    d = Distribution([0.0, 0.0])
    assert 0.0 < d.mean() == d.gittins() <= 1e-9
    assert d.gittins(100.0) > 50.0


@given(aged())
def test_conditioning_equals_asking_with_an_age(case):
    d, age = case
    rest = d.condition(age)
    assert rest.values[0] > 0.0
    assert rest.mean() == pytest.approx(d.mean(age), rel=1e-12)
    assert rest.gittins() == pytest.approx(d.gittins(age), rel=1e-9)
    for q in (0.0, 0.3, 0.95, 1.0):
        assert rest.quantile(q) == pytest.approx(d.quantile(q, age), rel=1e-12)


def test_huge_and_tiny_weights_survive_normalisation():
    assert Distribution([1, 3], [1e308, 1e308]).mean() == 2.0
    assert Distribution([1, 3], [5e-324, 5e-324]).mean() == 2.0


@pytest.mark.parametrize(
    ("values", "given_weights", "says"),
    [
        ([], None, "non-empty"),
        ([[1.0]], None, "one-dimensional"),
        ([1.0, float("nan")], None, r"values\[1\] is nan"),
        ([float("inf")], None, r"values\[0\] is inf"),
        ([-1.0], None, r"values\[0\] is -1.0"),
        (["many"], None, "numbers"),
        ([1.0], [-1.0], r"weights\[0\] is -1.0"),
        ([1.0], [float("nan")], r"weights\[0\] is nan"),
        ([1.0, 2.0], [0.0, 0.0], "sum to 0"),
        ([1.0, 2.0], [1.0], "1 entries for 2 values"),
    ],
)
def test_bad_samples_are_refused(values, given_weights, says):
    with pytest.raises(DemandError, match=says):
        Distribution(values, given_weights)


@pytest.mark.parametrize("age", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["mean", "gittins", "condition", "survival"])
def test_bad_ages_are_refused(method, age):
    with pytest.raises(DemandError, match="age is"):
        getattr(Distribution([1.0]), method)(age)


def test_bad_quantiles_are_refused():
    for q in (-0.1, 1.1, float("nan")):
        with pytest.raises(DemandError, match="q is"):
            Distribution([1.0]).quantile(q)
    with pytest.raises(DemandError, match="age is -1"):
        Distribution([1.0]).quantile(0.5, -1.0)


def test_repr_reads():
    assert repr(Distribution([1, 2, 3])) == (
        "Distribution(3 atoms, mean 2 s, median 2 s, p95 3 s, max 3 s)"
    )
