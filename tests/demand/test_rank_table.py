import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demand import DemandError, Distribution, RankTable
from demand.distribution.hull import Tails
from demand.distribution.rank_pieces import gittins_pieces
from demand.distribution.rank_table import _BUILDERS, rank_many
from demand.distribution.rank_variants import BUCKETS, RANKS, bucket_entries
from demand.distribution.rank_with_costs import CostedRanks
from tests.demand.strategies import (
    aged,
    distributions,
    hyperexponential_quantile,
    quantile_grid,
    ranks,
)


def test_every_rank_has_a_table():
    assert list(_BUILDERS) == list(RANKS)


@given(aged(), ranks())
def test_the_table_is_the_rank_at_every_age(case, rank):
    d, age = case
    table = RankTable(d, **rank)
    # The table adds areas from the tail; what it loses is relative to the whole demand.
    scale = d.values[-1] + rank.get("preemption_cost", 0.0)
    for a in (age, *d.values, *(d.values / 2)):
        expected = d.gittins(a, **rank)
        assert table.at(a) == pytest.approx(expected, rel=1e-8, abs=1e-10 * scale)
        assert table(a) == table.at(a)
        assert table.at(a) > 0.0 or rank["variant"] == "hermes_artifact"


@pytest.mark.parametrize("variant", RANKS)
@pytest.mark.parametrize("atoms", [1, 2, 63, 1000])
def test_the_table_is_the_rank_on_large_random_samples(atoms, variant):
    rng = np.random.default_rng(atoms)
    d = Distribution(rng.lognormal(0.0, 2.0, atoms), rng.random(atoms))
    ages = np.concatenate([d.values, rng.uniform(0, d.values[-1], 200), [0.0, 3 * d.values[-1]]])
    table = RankTable(d, variant)
    expected = [d.gittins(a, variant=variant) for a in ages]
    np.testing.assert_allclose(table(ages), expected, rtol=1e-7)
    assert table(ages).tolist() == [table.at(a) for a in ages]


@pytest.mark.parametrize(("quantum", "cost"), [(0.0, 0.1), (0.5, 0.0), (0.05, 20.0), (30.0, 1.0)])
@pytest.mark.parametrize("atoms", [1, 2, 63, 1000])
def test_the_table_with_costs_is_the_rank_on_large_random_samples(atoms, quantum, cost):
    rng = np.random.default_rng(atoms)
    d = Distribution(rng.lognormal(0.0, 2.0, atoms), rng.random(atoms))
    ages = np.concatenate([d.values, rng.uniform(0, d.values[-1], 200), [0.0, 3 * d.values[-1]]])
    costs = {"quantum": quantum, "preemption_cost": cost}
    table = RankTable(d, **costs)
    np.testing.assert_allclose(table(ages), [d.gittins(a, **costs) for a in ages], rtol=1e-7)
    assert table(ages).tolist() == [table.at(a) for a in ages]


@given(distributions())
def test_the_search_without_costs_finds_the_pieces(d):
    tails = Tails.of(d.values, d.weights)
    ages = np.linspace(0.0, d.values[-1], 50)[:-1]
    if d.values[-1] > 0.0:
        searched = CostedRanks(tails, 0.0, 0.0)(ages)
        np.testing.assert_allclose(gittins_pieces(tails)(ages), searched, rtol=1e-8, atol=1e-9)


@given(aged(), ranks(), st.floats(0.0, 120.0))
def test_next_above_is_the_first_age_over_the_threshold(case, rank, threshold):
    d, age = case
    table = RankTable(d, **rank)
    found = table.next_above(age, threshold)
    assert found >= age
    assert (found == age) == (table.at(age) > threshold)
    assert found == math.inf or table.at(found) > threshold
    if rank["variant"] != "hermes_artifact":  # all others rise for ever
        assert found < math.inf
    doublings = d.values[-1] * 2.0 ** np.arange(12)
    entries = [e for bucket in range(1, BUCKETS) for e in bucket_entries(d.values, bucket)]
    dense = np.linspace(age, min(found, 2 * d.values[-1] + age), 50)
    probes = [*d.values, *d.on_grid().values, *doublings, *entries, *dense]
    assert all(table.at(x) <= threshold for x in probes if age < x < found)


@given(distributions(), ranks())
def test_next_above_its_own_rank_moves_on(d, rank):
    table = RankTable(d, **rank)
    age = 0.0
    for _ in range(8):
        later = table.next_above(age, math.nextafter(table.at(age), math.inf))
        assert later > age
        if later == math.inf:
            assert rank["variant"] == "hermes_artifact"
            break
        age = later


@pytest.mark.parametrize("variant", RANKS)
def test_next_above_on_large_random_samples_is_a_scan_of_the_jumps(variant):
    rng = np.random.default_rng(0)
    d = Distribution(rng.lognormal(0.0, 2.0, 300))
    table = RankTable(d, variant)
    starts = np.unique(np.concatenate([bucket_entries(d.values, b) for b in range(1, 10)]))
    grid = d.on_grid().values
    ages = np.unique(np.concatenate([d.values, grid, starts[starts >= 0.0]]))
    ages = ages[ages < max(grid[-1], d.values[-1])]
    at_ages = table(ages)
    for age in rng.uniform(0.0, d.values[-1], 40):
        threshold = table.at(age) * rng.uniform(1.0, 3.0)
        over = ages[(ages > age) & (at_ages > threshold)]
        found = table.next_above(age, threshold)
        assert found == over[0] if over.size else found >= d.values[-1]


def test_next_above_infinity_never_comes():
    assert RankTable(Distribution([1, 2])).next_above(0.5, math.inf) == math.inf


def test_pieces_grow_linearly():
    for quantile in (hyperexponential_quantile, lambda q: -np.log1p(-q), lambda q: q):
        d = quantile_grid(quantile, 2000)
        assert len(gittins_pieces(Tails.of(d.values, d.weights))) <= 2 * 2000


def test_table_shapes():
    for table in (RankTable(Distribution([1.0, 4.0])), RankTable(Distribution([0, 4]), quantum=1)):
        assert table(0.0).shape == ()
        assert table([]).shape == (0,)
        assert table([[0.0, 2.0, 9.0]]).shape == (1, 3)


def test_weights_too_small_to_change_a_sum_do_no_harm():
    d = Distribution([1, 2, 3, 4], [1e-30, 1.0, 1e-30, 1.0])
    ages = [0.0, 0.5, 1.0, 1.5, 2.5, 3.5]
    for variant in RANKS:
        expected = [d.gittins(a, variant=variant) for a in ages]
        np.testing.assert_allclose(RankTable(d, variant)(ages), expected, rtol=1e-12)


def test_atoms_that_differ_by_rounding_only():
    d = Distribution([1.0, math.nextafter(1.0, 2.0)])
    for variant in RANKS:
        assert RankTable(d, variant).at(0.25) == pytest.approx(0.75)
        assert d.gittins(1e300, variant=variant) == RankTable(d, variant).at(1e300)


def test_bad_ages_are_refused():
    table = RankTable(Distribution([1.0]))
    for age in (-1.0, math.nan, math.inf):
        for ask in (table, table.at, lambda a: table([0.0, a])):
            with pytest.raises(DemandError, match=f"age is {age}"):
                ask(age)


def test_repr_reads():
    d = Distribution([1.0, 4.0])
    assert repr(RankTable(d)) == "RankTable(gittins, 2 atoms, rank at age 0 2 s)"
    assert repr(RankTable(d, quantum=2, preemption_cost=0.25)) == (
        "RankTable(gittins, quantum 2 s, preemption_cost 0.25 s, 2 atoms, rank at age 0 2.75 s)"
    )


def test_ranking_many_is_each_jobs_own_table():
    rng = np.random.default_rng(0)
    tables = [RankTable(Distribution(rng.lognormal(0.0, 1.0, n))) for n in (1, 5, 200)]
    which, ages = rng.integers(0, 3, 500), rng.exponential(2.0, 500)
    expected = [tables[k].at(a) for k, a in zip(which, ages, strict=True)]
    assert rank_many(tables, which, ages).tolist() == expected
    assert rank_many(tables, [], []).shape == (0,)
    assert rank_many(tables, [1], [0.0]) == tables[1].at(0.0)


@pytest.mark.parametrize(
    ("which", "ages", "says"),
    [
        ([0], [1.0, 2.0], r"applications has shape \(1,\) and ages \(2,\)"),
        ([[0]], [[1.0]], "one-dimensional"),
        ([0, 2], [1.0, 2.0], "from 0 to 2; expected whole numbers from 0 to 1"),
        ([-1], [1.0], "from -1 to -1"),
        ([0.5], [1.0], "holds float64"),
        ([0], [-1.0], "age is -1"),
    ],
)
def test_ranking_many_refuses_bad_input(which, ages, says):
    tables = [RankTable(Distribution([1.0])), RankTable(Distribution([2.0]))]
    with pytest.raises(DemandError, match=says):
        rank_many(tables, which, ages)
