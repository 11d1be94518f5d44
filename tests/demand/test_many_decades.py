"""Ranks of demands that span 30 decades, against exact fractions."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demand import Distribution, RankTable
from demand.distribution.rank_variants import BUCKETS, bucket_entries

TOLERANCE = 1e-9


def exact_rank(d, age, quantum=0.0, preemption_cost=0.0):
    """inf over D >= quantum of (cost + E[min(X - age, D)]) / P(X - age <= D), of those alive."""
    a, q, cost = Fraction(age), Fraction(quantum), Fraction(preemption_cost)
    alive = [
        (Fraction(x) - a, Fraction(w)) for x, w in zip(d.values, d.weights, strict=True) if x > age
    ]
    total = sum(w for _, w in alive)
    best = None
    for stop in [q, *(left for left, _ in alive if left >= q)]:
        finished = sum(w for left, w in alive if left <= stop)
        if finished:
            spent = cost * total + sum(w * min(left, stop) for left, w in alive)
            best = spent / finished if best is None else min(best, spent / finished)
    return float(best)


def exact_mean(d, age):
    alive = [
        (Fraction(x), Fraction(w)) for x, w in zip(d.values, d.weights, strict=True) if x > age
    ]
    total = sum(w for _, w in alive)
    return float(sum(w * (x - Fraction(age)) for x, w in alive) / total)


def exact_buckets(d, age, artifact):
    """Ten stops, each with the atoms that `bucket_entries` puts within it."""
    a, largest = Fraction(age), Fraction(d.values[-1])
    alive = d.values > age
    left = [Fraction(x) - a for x in d.values[alive]]
    weights = [Fraction(w) for w in d.weights[alive]]
    best = None
    for bucket in range(1, BUCKETS + 1):
        stop = Fraction(bucket, BUCKETS) * (largest - a)
        inside = bucket_entries(d.values, bucket)[alive] <= age
        finished = sum(w for w, within in zip(weights, inside, strict=True) if within)
        if not finished:
            continue
        if artifact:
            own = sum(w * x for w, x, within in zip(weights, left, inside, strict=True) if within)
            rank = own * sum(weights) / finished**2
        else:
            rank = sum(w * min(x, stop) for w, x in zip(weights, left, strict=True)) / finished
        best = rank if best is None else min(best, rank)
    return float(best)


decades = st.floats(-15.0, 15.0).map(lambda power: 10.0**power)
shares = st.floats(-15.0, 0.0).map(lambda power: 10.0**power)


@st.composite
def wide(draw):
    """Up to 10 atoms, each anywhere in 30 decades of seconds and 15 of probability."""
    values = draw(st.lists(decades, min_size=1, max_size=10, unique=True))
    return Distribution(values, draw(st.lists(shares, min_size=len(values), max_size=len(values))))


def ages_of(d):
    """At, just before, just after and between the atoms, and 0."""
    ages = [0.0, *d.values[:-1].tolist()]
    for before, after in pairwise([0.0, *d.values.tolist()]):
        ages += [np.nextafter(after, 0.0), np.sqrt(before * after), (before + after) / 2]
        ages += [np.nextafter(before, after), after * (1.0 - 1e-9)]
    return [age for age in ages if age < d.values[-1]]


def assert_both_are(d, expected, ages=None, **rank):
    """`gittins` and the table, one age and all ages, give what `expected` does."""
    table, ages = RankTable(d, **rank), ages_of(d) if ages is None else ages
    exact = [expected(age) for age in ages]
    np.testing.assert_allclose([d.gittins(a, **rank) for a in ages], exact, rtol=TOLERANCE)
    np.testing.assert_allclose([table.at(a) for a in ages], exact, rtol=TOLERANCE)
    np.testing.assert_allclose(table(ages), exact, rtol=TOLERANCE)


def test_the_table_of_five_atoms_over_twenty_decades():
    d = Distribution(
        [2.538e-10, 7.48e-10, 7.85e-4, 9.43e6, 2.13e9], [2.2e-4, 0.306, 0.223, 0.467, 0.0035]
    )
    assert d.gittins() == pytest.approx(2.44e-9, rel=5e-3)
    assert RankTable(d).at(0.0) == pytest.approx(d.gittins(), rel=TOLERANCE)


@given(wide())
def test_ranks_and_tables_are_exact_over_thirty_decades(d):
    assert_both_are(d, lambda age: exact_rank(d, age))


@given(wide(), st.one_of(st.just(0.0), decades), st.one_of(st.just(0.0), decades))
def test_ranks_with_costs_are_exact_over_thirty_decades(d, quantum, cost):
    costs = {"quantum": quantum, "preemption_cost": cost}
    assert_both_are(d, lambda age: exact_rank(d, age, **costs), **costs)


@given(wide())
def test_mean_remaining_is_exact_over_thirty_decades(d):
    assert_both_are(d, lambda age: exact_mean(d, age), variant="mean")


@pytest.mark.parametrize("variant", ["bucketed", "hermes_artifact"])
@given(d=wide())
def test_bucketed_ranks_are_exact_over_thirty_decades(variant, d):
    artifact = variant == "hermes_artifact"
    # At these ages an atom comes within a stop, so that the rank jumps: rounding decides.
    jumps = np.array([bucket_entries(d.values, bucket) for bucket in range(1, BUCKETS)])
    ages = [age for age in ages_of(d) if (np.abs(jumps - age) > 1e-8 * age).all()]
    assert_both_are(d, lambda age: exact_buckets(d, age, artifact), ages, variant=variant)


@given(wide())
def test_shifted_ranks_are_those_of_the_grid_over_thirty_decades(d):
    table = RankTable(d, "shifted")
    for age in ages_of(d):
        assert table.at(age) == pytest.approx(d.gittins(age, variant="shifted"), rel=TOLERANCE)


@pytest.mark.parametrize("atoms", [63, 400])
def test_large_samples_over_thirty_decades(atoms):
    rng = np.random.default_rng(atoms)
    d = Distribution(10.0 ** rng.uniform(-15, 15, atoms), 10.0 ** rng.uniform(-15, 0, atoms))
    ages = rng.choice(d.values[:-1], 60) * rng.choice([1.0, 1.0 + 1e-12, 0.5, 1e-3], 60)
    for rank in (
        {},
        {"quantum": 1e-3},
        {"preemption_cost": 1e-7},
        {"quantum": 50.0, "preemption_cost": 2.0},
    ):
        exact = [exact_rank(d, age, **rank) for age in ages] if atoms < 100 else None
        told = [d.gittins(age, **rank) for age in ages]
        np.testing.assert_allclose(RankTable(d, **rank)(ages), told, rtol=TOLERANCE)
        if exact:
            np.testing.assert_allclose(told, exact, rtol=TOLERANCE)
    for variant in ("mean", "shifted", "bucketed", "hermes_artifact"):
        told = [d.gittins(age, variant=variant) for age in ages]
        np.testing.assert_allclose(RankTable(d, variant)(ages), told, rtol=TOLERANCE)


@given(wide(), st.floats(0.0, 1.0))
def test_quantiles_are_exact_over_thirty_decades(d, q):
    """Up to the rounding of sums and of q, at which a step may go either way."""
    weights = [Fraction(w) for w in d.weights]
    total, below = sum(weights), Fraction(0)
    at = d.quantile(q)
    slack = Fraction(2) / 10**12
    allowed = []
    for value, weight in zip(d.values, weights, strict=True):
        before, below = below, below + weight
        level = Fraction(q) * total
        nearer = min(level, total - level) * slack + Fraction(1, 2**51) * (0 < q < 1)
        if before < level + nearer and below >= level - nearer:
            allowed.append(float(value))
    assert at in (allowed or [float(d.values[0])])


def test_the_last_quantile_is_the_largest_atom_however_rare():
    d = Distribution([1.0, 100.0], [1.0, 1e-20])
    assert d.quantile(1.0) == 100.0
    assert d.quantile(1.0 - 1e-9) == 1.0
    assert Distribution([1.0, 2.0], [1e-20, 1.0]).quantile(0.0) == 1.0
    assert Distribution([1.0, 2.0], [1e-20, 1.0]).quantile(1e-25) == 1.0


@given(wide())
def test_conditioned_means_are_exact_over_thirty_decades(d):
    for age in ages_of(d)[::3]:
        assert d.mean(age) == pytest.approx(exact_mean(d, age), rel=TOLERANCE)
        rest = d.condition(age)
        assert rest.mean() == pytest.approx(exact_mean(d, age), rel=TOLERANCE)
        assert rest.gittins() == pytest.approx(exact_rank(d, age), rel=TOLERANCE)


def test_doubling_is_exact_at_any_age():
    assert Distribution([0.0]).gittins(1e300) > 5e299  # nanoseconds, doubled a thousand times
    largest = 0.1 + 0.2
    d = Distribution([largest])
    just_before = np.nextafter(8 * largest, 0.0)
    assert d.mean(just_before) == 4 * largest
    assert d.mean(8 * largest) == 8 * largest
