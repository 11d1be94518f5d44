import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from demand import DemandError, Distribution, RankTable, gittins_brute_force, gittins_rank
from tests.demand.strategies import aged, distributions, hyperexponential_quantile, quantile_grid


@given(aged())
def test_every_route_to_the_rank_agrees(case):
    d, age = case
    slow = gittins_brute_force(d.values, d.weights, age)
    table = RankTable(d)
    assert gittins_rank(d.values, d.weights, age) == pytest.approx(slow, rel=1e-9)
    assert d.gittins(age) == pytest.approx(slow, rel=1e-9)
    # The table adds areas from the tail; what it loses is relative to the whole demand.
    assert table.at(age) == pytest.approx(slow, rel=1e-9, abs=1e-11 * d.values[-1])
    assert table(age) == table.at(age)


@given(aged())
def test_the_mean_table_is_the_mean_remaining_demand(case):
    d, age = case
    assert RankTable(d, rank="mean").at(age) == pytest.approx(d.mean(age), rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("atoms", [1, 2, 63, 1000])
def test_table_equals_single_ranks_on_large_random_samples(atoms):
    rng = np.random.default_rng(atoms)
    d = Distribution(rng.lognormal(0.0, 2.0, atoms), rng.random(atoms))
    ages = np.concatenate([d.values, rng.uniform(0, d.values[-1], 200), [0.0, 3 * d.values[-1]]])
    np.testing.assert_allclose(RankTable(d)(ages), [d.gittins(a) for a in ages], rtol=1e-8)
    np.testing.assert_allclose(RankTable(d, "mean")(ages), [d.mean(a) for a in ages], rtol=1e-8)


@given(aged())
def test_rank_is_positive_and_at_most_the_mean_remaining(case):
    d, age = case
    assert 0.0 < d.gittins(age) <= d.mean(age) * (1 + 1e-12)
    assert RankTable(d).at(age) > 0.0


@given(aged(), st.integers(-4, 4))
def test_rank_scales_with_time(case, power):
    d, age = case
    assume(d.values[-1] > 0.0)
    factor = 2.0**power  # exact, so that an age on an atom stays on it
    scaled = Distribution(factor * d.values, d.weights)
    expected = pytest.approx(factor * d.gittins(age), rel=1e-12)
    assert scaled.gittins(factor * age) == expected
    assert RankTable(scaled).at(factor * age) == pytest.approx(
        factor * RankTable(d).at(age), rel=1e-9
    )


def test_rank_of_a_point_mass_is_what_is_left():
    table = RankTable(Distribution([5.0]))
    np.testing.assert_allclose(table([0.0, 1.0, 4.5]), [5.0, 4.0, 0.5])


@pytest.mark.parametrize(("s1", "s2", "p"), [(1, 100, 0.9), (2, 3, 0.5), (1, 10, 0.05)])
def test_rank_of_two_points(s1, s2, p):
    table = RankTable(Distribution([s1, s2], [p, 1 - p]))
    for a in np.linspace(0, s1, 7)[:-1]:
        expected = min((s1 - a) / p, p * s1 + (1 - p) * s2 - a)
        assert table.at(a) == pytest.approx(expected, rel=1e-12)
    for a in np.linspace(s1, s2, 7)[:-1]:
        assert table.at(a) == pytest.approx(s2 - a, rel=1e-12)


def test_two_points_by_hand():
    assert Distribution([1, 100], [0.9, 0.1]).gittins() == pytest.approx(1.1111, abs=1e-4)


GRID = 2000


@pytest.mark.parametrize(
    ("quantile", "rank_at", "ages"),
    [
        (lambda q: -np.log1p(-q), lambda a: 1.0, [0.0, 0.5, 1.0, 2.0]),
        (lambda q: 4.0 * q, lambda a: (4.0 - a) / 2, [0.0, 1.0, 3.0]),
        (hyperexponential_quantile, None, [0.0, 0.5, 2.0]),
        (lambda q: (1.0 - q) ** (-1 / 1.5), lambda a: a / 1.5, [1.0, 2.0, 4.0]),
        (lambda q: (1.0 - q) ** (-1 / 1.5), lambda a: 2.27883, [0.0]),
    ],
    ids=["exponential", "uniform", "hyperexponential", "pareto", "pareto at 0"],
)
def test_closed_forms_on_a_quantile_grid(quantile, rank_at, ages):
    """On a grid of 2000 quantiles, at ages just past an atom, within 2 %.

    Between atoms an empirical rank falls towards 0, and random samples have gaps small enough to
    make it noise everywhere; the ages are therefore moved up to the grid.
    """
    d = quantile_grid(quantile, GRID)
    if rank_at is None:  # decreasing hazard: 1 / hazard
        rank_at = _inverse_hyperexponential_hazard
    for age in ages:
        at = 0.0 if age == 0.0 else d.values[np.searchsorted(d.values, age)]
        assert d.gittins(at) == pytest.approx(rank_at(at), rel=0.02)


def _inverse_hyperexponential_hazard(a):
    fast, slow = 0.9 * math.exp(-a / 0.5), 0.1 * math.exp(-a / 5.5)
    return (fast + slow) / (fast / 0.5 + slow / 5.5)


def test_lognormal_reference_value():
    from statistics import NormalDist

    grid = np.arange(1, GRID + 1) / (GRID + 1)
    d = Distribution(np.exp([NormalDist().inv_cdf(q) for q in grid]))
    assert d.gittins() == pytest.approx(1.47104, rel=0.01)


@given(aged(), st.floats(0.0, 120.0))
def test_next_above_is_the_first_age_over_the_threshold(case, threshold):
    d, age = case
    table = RankTable(d)
    found = table.next_above(age, threshold)
    assert found >= age
    assert table.at(found) > threshold
    assert (found == age) == (table.at(age) > threshold)
    doublings = d.values[-1] * 2.0 ** np.arange(12) if d.values[-1] > 0 else []
    candidates = [x for x in [*d.values, *doublings] if age < x < found]
    assert all(table.at(x) <= threshold for x in candidates)


@given(distributions())
def test_next_above_its_own_rank_moves_on(d):
    table = RankTable(d)
    age = 0.0
    for _ in range(8):
        later = table.next_above(age, math.nextafter(table.at(age), math.inf))
        assert later > age
        age = later


def test_next_above_infinity_never_comes():
    assert RankTable(Distribution([1, 2])).next_above(0.5, math.inf) == math.inf


def test_pieces_grow_linearly():
    d = quantile_grid(hyperexponential_quantile, GRID)
    assert "2000 atoms" in repr(RankTable(d))
    pieces = int(repr(RankTable(d)).split(" atoms, ")[1].split()[0])
    assert pieces <= 2 * GRID


def test_table_shapes():
    table = RankTable(Distribution([1.0, 4.0]))
    assert table(0.0).shape == ()
    assert table([]).shape == (0,)
    assert table([[0.0, 2.0, 9.0]]).shape == (1, 3)


def test_weights_too_small_to_change_a_sum_do_no_harm():
    d = Distribution([1, 2, 3, 4], [1e-30, 1.0, 1e-30, 1.0])
    ages = [0.0, 0.5, 1.0, 1.5, 2.5, 3.5]
    np.testing.assert_allclose(RankTable(d)(ages), [d.gittins(a) for a in ages], rtol=1e-12)


def test_bad_input_is_refused():
    table = RankTable(Distribution([1.0]))
    for age in (-1.0, float("nan"), float("inf")):
        for ask in (table, table.at, lambda a: gittins_rank([1.0], None, a)):
            with pytest.raises(DemandError, match="age is"):
                ask(age)
    with pytest.raises(DemandError, match="sum to 0"):
        gittins_rank([1.0], [0.0], 0.0)
    with pytest.raises(DemandError, match="expected one of gittins, mean"):
        RankTable(Distribution([1.0]), rank="magic")
