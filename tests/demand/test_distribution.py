import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from demand import DemandError, Distribution
from demand.distribution.grid import default_step
from tests.demand.strategies import aged, distributions


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


def plain_mean(d):
    return d.values @ d.weights


def assert_same(a, b):
    """Up to rounding."""
    np.testing.assert_allclose(a.values, b.values, rtol=1e-12)
    np.testing.assert_allclose(a.weights, b.weights, rtol=1e-12)


def test_a_sum_by_hand():
    d = Distribution([1, 3], [0.75, 0.25]) + Distribution([0, 2])
    assert d == Distribution([1, 3, 5], [0.375, 0.5, 0.125])
    with pytest.raises(TypeError):
        d + 1.0


@given(distributions(), distributions())
def test_a_sum_adds_means_and_variances(a, b):
    total = a.convolve(b)  # at most 144 atoms, so exact
    assert plain_mean(total) == pytest.approx(plain_mean(a) + plain_mean(b), rel=1e-12)
    variance = [d.weights @ (d.values - plain_mean(d)) ** 2 for d in (a, b, total)]
    assert variance[2] == pytest.approx(variance[0] + variance[1], rel=1e-9, abs=1e-9)
    assert_same(b + a, total)


@given(distributions(), distributions(), st.integers(2, 40))
def test_compression_keeps_the_mean_and_moves_no_mass_far(a, b, atoms):
    whole = a + b
    few = a.convolve(b, atoms=atoms)
    assert_same(few, whole.compress(atoms))
    assert len(few) <= atoms
    assert plain_mean(few) == pytest.approx(plain_mean(whole), rel=1e-12)
    assert few.values[-1] == pytest.approx(whole.values[-1], rel=1e-12)
    most = (whole.values[-1] - whole.values[0]) / (atoms // 2)
    # The k-th part of the mass, in order, is where it was, give or take `most`.
    levels = np.linspace(0.0, 1.0, 24)
    moved = [abs(few.quantile(q) - whole.quantile(q)) for q in levels]
    if whole.values[0] > 0.0:  # quantiles are of X > 0, so an atom at 0 must stay one
        assert max(moved) <= most * (1 + 1e-9) + 1e-9


def test_compression_follows_a_long_tail():
    """10,000 lognormal samples as 200 atoms: the head by mass, the tail by width."""
    d = Distribution(np.random.default_rng(0).lognormal(0.0, 2.0, 10_000))
    few = d.compress(200)
    assert len(few) <= 200
    for q in (0.1, 0.5, 0.9, 0.99):
        assert few.quantile(q) == pytest.approx(d.quantile(q), rel=0.1)
    for age in (0.0, 1.0, 10.0, 100.0):
        assert few.mean(age) == pytest.approx(d.mean(age), rel=0.1)


def test_a_mixture_by_hand():
    a, b = Distribution([1, 2]), Distribution([2, 6], [3, 1])
    assert_same(Distribution.mixture([a, b]), Distribution([1, 2, 6], [2, 5, 1]))
    assert_same(Distribution.mixture([a, b], [3, 1]), Distribution([1, 2, 6], [6, 9, 1]))
    assert Distribution.mixture([a, b], [0, 2]) == b


def test_scale_and_shift_by_hand():
    d = Distribution([1, 3], [0.75, 0.25])
    assert d.scale(2.0) == Distribution([2, 6], [0.75, 0.25])
    assert d.shift(1.5) == Distribution([2.5, 4.5], [0.75, 0.25])
    assert d.shift(-1.0) == Distribution([0, 2], [0.75, 0.25])


def test_the_grid_by_hand():
    d = Distribution([0, 0.1, 0.2, 0.25, 0.30000000000000004, 0.7])
    assert_same(d.on_grid(0.1), Distribution([0, 0.1, 0.2, 3 * 0.1, 7 * 0.1], [1, 1, 1, 2, 1]))
    assert_same(d.on_grid(10.0), Distribution([0, 10], [1, 5]))


@given(distributions(), st.one_of(st.none(), st.floats(0.01, 5.0)))
def test_the_grid_rounds_up_by_less_than_a_step(d, step):
    on_grid = d.on_grid(step)
    if step is None:
        step = default_step(d.values, d.weights)
    if step == 0.0:
        assert on_grid is d
        return
    assert (on_grid.on_grid(step).values == on_grid.values).all()
    gap = on_grid.values[np.searchsorted(on_grid.values, d.values)] - d.values
    assert (gap >= 0.0).all()
    assert (gap < step * (1 + 1e-9)).all()


@given(distributions(), st.integers(-6, 6))
def test_the_default_step_scales_with_time(d, power):
    step = default_step(d.values, d.weights)
    scaled = d.scale(2.0**power)
    assert default_step(scaled.values, scaled.weights) == pytest.approx(2.0**power * step)


def test_the_default_step_by_hand():
    d = Distribution(np.arange(1, 9))  # quartiles 2 and 6, 8 samples
    assert default_step(d.values, d.weights) == pytest.approx((6 - 2) / 2 / 2)
    known = Distribution([1, 100], [0.9, 0.1])
    assert default_step(known.values, known.weights) == 0.0
    assert known.on_grid() is known
    rounded = Distribution([0.1 + 0.2, 0.3])
    assert rounded.on_grid() is rounded


@given(distributions(), st.floats(0.0, 50.0))
def test_shifting_back_by_conditioning(d, seconds):
    assume(d.values[0] > 0.0)
    back = d.shift(seconds).condition(seconds)
    assert back.mean() == pytest.approx(d.mean(), rel=1e-9)
    assert back.values[-1] == pytest.approx(d.values[-1], rel=1e-9)


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


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: d.scale(0.0), "factor is 0.0"),
        (lambda d: d.scale(float("inf")), "factor is inf"),
        (lambda d: d.shift(float("nan")), "seconds is nan"),
        (lambda d: d.shift(-1.5), "smallest atom, 1.0: .* use condition"),
        (lambda d: d.on_grid(0.0), "step_seconds is 0.0"),
        (lambda d: d.on_grid(float("nan")), "step_seconds is nan"),
        (lambda d: d.on_grid(1e-13), "step_seconds is 1e-13 for atoms up to 4.0"),
        (lambda d: d.compress(1), "atoms is 1; expected at least 2"),
        (lambda d: d.convolve(d, atoms=0), "atoms is 0"),
        (lambda d: Distribution.mixture([]), "at least one"),
        (lambda d: Distribution.mixture([d, d], [1.0]), "1 entries for 2 distributions"),
        (lambda d: Distribution.mixture([d, d], [0.0, 0.0]), "sum to 0"),
        (lambda d: Distribution.mixture([d, d], [1.0, -1.0]), r"weights\[1\] is -1.0"),
    ],
)
def test_bad_changes_are_refused(make, says):
    with pytest.raises(DemandError, match=says):
        make(Distribution([1.0, 2.0, 4.0]))


def test_a_sum_of_too_many_outcomes_is_refused():
    d = Distribution(np.arange(5000))
    with pytest.raises(DemandError, match=r"25000000 outcomes; .* call compress"):
        d.convolve(d)


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


@given(aged(), st.floats(0.0, 200.0))
def test_conditioning_moves_the_age_up_to_the_largest_sample(known_and_age, later):
    known, age = known_and_age
    rest = known.condition(age)
    assert rest.extrapolated == (age >= known.values[-1])
    if age + later < known.values[-1] and later < rest.values[-1]:
        assert rest.gittins(later) == pytest.approx(known.gittins(age + later), rel=1e-6)
