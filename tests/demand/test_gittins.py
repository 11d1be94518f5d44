import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from demand import DemandError, Distribution, gittins_rank
from demand.distribution.rank import gittins_brute_force
from tests.demand.strategies import aged, costs, hyperexponential_quantile, quantile_grid


@given(aged(), costs())
def test_the_rank_is_its_definition(case, cost):
    d, age = case
    slow = gittins_brute_force(d.values, d.weights, age, **cost)
    assert gittins_rank(d.values, d.weights, age, **cost) == pytest.approx(slow, rel=1e-9)
    assert d.gittins(age, **cost) == pytest.approx(slow, rel=1e-9)


@given(aged())
def test_rank_is_positive_and_at_most_the_mean_remaining(case):
    d, age = case
    assert 0.0 < d.gittins(age) <= d.mean(age) * (1 + 1e-12)


@given(aged(), costs(), st.integers(-4, 4))
def test_rank_scales_with_time(case, cost, power):
    d, age = case
    assume(d.values[-1] > 0.0)
    factor = 2.0**power  # exact, so that an age on an atom stays on it
    scaled = {name: factor * seconds for name, seconds in cost.items()}
    assert d.scale(factor).gittins(factor * age, **scaled) == pytest.approx(
        factor * d.gittins(age, **cost), rel=1e-12
    )


@given(aged(), costs(), st.floats(0.0, 50.0))
def test_rank_rises_with_quantum_and_cost_up_to_the_mean_remaining_and_the_cost(case, cost, more):
    d, age = case
    quantum, paid = cost["quantum"], cost["preemption_cost"]
    rank = d.gittins(age, **cost)
    slack = 1e-12 * (rank + more)
    assert rank <= d.mean(age) + paid + slack
    assert d.gittins(age, quantum=quantum + more, preemption_cost=paid) >= rank - slack
    assert d.gittins(age, quantum=quantum, preemption_cost=paid + more) >= rank + more - slack
    whole = d.gittins(age, quantum=1e6, preemption_cost=paid)
    assert whole == pytest.approx(d.mean(age) + paid, rel=1e-12)


@given(aged())
def test_no_quantum_and_no_cost_is_the_plain_rank(case):
    d, age = case
    assert d.gittins(age, quantum=0.0, preemption_cost=0.0) == d.gittins(age)


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 1.0)), min_size=1, max_size=12))
def test_between_atoms_the_rank_falls_by_one_over_the_chance_to_stop(atoms):
    """And jumps up past an atom, where what is nearest to its end is gone."""
    d = Distribution(*zip(*atoms, strict=True))
    for left, right in pairwise([0.0, *d.values]):
        ages = left + (right - left) * np.linspace(0.0, 0.99, 15)
        ranks = np.array([d.gittins(a) for a in ages])
        weight = d.weights[d.values > left]
        slopes = weight.sum() / np.cumsum(weight)  # one for each atom at which to stop
        falls = -np.diff(ranks) / np.diff(ages)
        # But for the steps within which the best stop changes, and those lie in between.
        near = np.isclose(falls[:, None], slopes, rtol=1e-6).any(axis=1)
        assert near.sum() >= len(falls) - (len(weight) - 1)
        assert (falls > slopes[-1] * (1 - 1e-6)).all()
        assert (falls < slopes[0] * (1 + 1e-6)).all()
        assert d.gittins(right) > d.gittins(right - 1e-6)


def test_costs_by_hand():
    """{1, 4} alike: stop at 1 for (1 + 1) / 2 of service and half a chance, or go on to 4."""
    d = Distribution([1, 4])
    assert d.gittins() == 2.0
    assert d.gittins(quantum=2.0) == 2.5  # (0.5 + 1) / 0.5 = 3 at the quantum; the mean is better
    assert d.gittins(preemption_cost=0.25) == 2.5  # (1 + 0.25) / 0.5
    assert d.gittins(preemption_cost=1.0) == 3.5  # 2.5 + 1 beats (1 + 1) / 0.5
    assert d.gittins(5.0, quantum=9.0, preemption_cost=0.5) == 4.5  # beyond: 4 more, and the cost


@pytest.mark.parametrize("s", [0.5, 5.0])
def test_rank_of_a_point_mass_is_what_is_left(s):
    for a in (0.0, 0.2, 0.9):
        assert Distribution([s]).gittins(a * s) == pytest.approx(s - a * s, rel=1e-12)


@pytest.mark.parametrize(("s1", "s2", "p"), [(1, 100, 0.9), (2, 3, 0.5), (1, 10, 0.05)])
def test_rank_of_two_points(s1, s2, p):
    d = Distribution([s1, s2], [p, 1 - p])
    for a in np.linspace(0, s1, 7)[:-1]:
        expected = min((s1 - a) / p, p * s1 + (1 - p) * s2 - a)
        assert d.gittins(a) == pytest.approx(expected, rel=1e-12)
    for a in np.linspace(s1, s2, 7)[:-1]:
        assert d.gittins(a) == pytest.approx(s2 - a, rel=1e-12)


def test_two_points_by_hand():
    assert Distribution([1, 100], [0.9, 0.1]).gittins() == pytest.approx(1.1111, abs=1e-4)


GRID = 2000


def _inverse_hyperexponential_hazard(a):
    fast, slow = 0.9 * math.exp(-a / 0.5), 0.1 * math.exp(-a / 5.5)
    return (fast + slow) / (fast / 0.5 + slow / 5.5)


def _weibull_2_mean_remaining(a):
    return math.sqrt(math.pi) / 2 * math.erfc(a) * math.exp(a * a)


@pytest.mark.parametrize(
    ("quantile", "rank_at", "ages"),
    [
        (lambda q: -np.log1p(-q), lambda a: 1.0, [0.0, 0.5, 1.0, 2.0]),
        (lambda q: 4.0 * q, lambda a: (4.0 - a) / 2, [0.0, 1.0, 3.0]),
        (hyperexponential_quantile, _inverse_hyperexponential_hazard, [0.0, 0.5, 2.0]),
        (lambda q: (1.0 - q) ** (-1 / 1.5), lambda a: a / 1.5, [1.0, 2.0, 4.0]),
        (lambda q: (1.0 - q) ** (-1 / 1.5), lambda a: 2.27883, [0.0]),
        (lambda q: np.sqrt(-np.log1p(-q)), _weibull_2_mean_remaining, [0.0, 0.5, 1.0, 1.5]),
        (lambda q: np.log1p(-q) ** 2, lambda a: 2 * math.sqrt(a), [0.1, 1.0, 4.0]),
        (lambda q: np.exp([NormalDist().inv_cdf(p) for p in q]), lambda a: 1.47104, [0.0]),
    ],
    ids=[
        *("exponential", "uniform", "hyperexponential", "pareto", "pareto at 0"),
        *("weibull of shape 2", "weibull of shape 0.5", "lognormal at 0"),
    ],
)
def test_closed_forms_on_a_quantile_grid(quantile, rank_at, ages):
    """On a grid of 2000 quantiles, at ages just past an atom, within 2 %.

    Between atoms an empirical rank falls towards 0, and random samples have gaps small enough to
    make it noise everywhere; the ages are therefore moved up to the grid.
    """
    d = quantile_grid(quantile, GRID)
    for age in ages:
        at = 0.0 if age == 0.0 else d.values[np.searchsorted(d.values, age)]
        assert d.gittins(at) == pytest.approx(rank_at(at), rel=0.02)


def test_bad_input_is_refused():
    for age in (-1.0, math.nan, math.inf):
        with pytest.raises(DemandError, match="age is"):
            gittins_rank([1.0], None, age)
    with pytest.raises(DemandError, match="sum to 0"):
        gittins_rank([1.0], [0.0], 0.0)
    for bad in (-1.0, math.nan, math.inf):
        for name in ("quantum", "preemption_cost"):
            with pytest.raises(DemandError, match=f"{name} is {bad}; expected finite seconds"):
                gittins_rank([1.0], None, 0.0, **{name: bad})
