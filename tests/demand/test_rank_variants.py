import numpy as np
import pytest
from hypothesis import given

from demand import DemandError, Distribution, RankTable
from demand.distribution.grid import default_step
from demand.distribution.rank import gittins_brute_force
from demand.distribution.rank_variants import RANKS
from tests.demand.strategies import aged, costs


def slow_buckets(d, age, artifact):
    """The bucketed ranks by loops over stops and atoms."""
    alive = [(x - age, w) for x, w in zip(d.values, d.weights, strict=True) if x > age]
    total = sum(w for _, w in alive)
    best = np.inf
    for bucket in range(1, 11):
        stop = bucket * alive[-1][0] / 10 * (1 + 1e-13)  # a stop on an atom reaches it
        finished = sum(w for left, w in alive if left <= stop) / total
        if finished == 0.0:
            continue
        if artifact:
            spent = sum(left * w for left, w in alive if left <= stop) / total / finished
        else:
            spent = sum(min(left, stop) * w for left, w in alive) / total
        best = min(best, spent / finished)
    return best


@pytest.mark.parametrize("variant", ["bucketed", "hermes_artifact"])
@given(case=aged())
def test_bucketed_ranks_are_their_definition(variant, case):
    d, age = case
    if age < d.values[-1]:
        slow = slow_buckets(d, age, artifact=variant == "hermes_artifact")
        assert d.gittins(age, variant=variant) == pytest.approx(slow, rel=1e-9, abs=1e-9)


@given(aged())
def test_bucketed_lies_between_the_exact_rank_and_the_mean(case):
    d, age = case
    slack = 1e-12 * (d.values[-1] + age)
    assert d.gittins(age) - slack <= d.gittins(age, variant="bucketed") <= d.mean(age) + slack


@given(aged(), costs())
def test_shifted_is_the_exact_rank_on_the_grid(case, cost):
    d, age = case
    step = default_step(d.values, d.weights)
    on_grid = d.on_grid()
    at = age if step == 0.0 else step * np.floor(age / step + 1e-9)
    slow = gittins_brute_force(on_grid.values, on_grid.weights, at, **cost)
    assert d.gittins(age, variant="shifted", **cost) == pytest.approx(slow, rel=1e-6, abs=1e-7)


def test_mean_by_name():
    d = Distribution([1, 4, 9])
    assert d.gittins(2.0, variant="mean") == d.mean(2.0) == 4.5
    assert d.gittins(9.0, variant="mean") == d.mean(9.0)


def test_buckets_miss_a_narrow_mode():
    """{1: 0.9, 100: 0.1}: the first stop, 10, finds the mode at 1 and pays 0.9 s more for it."""
    d = Distribution([1, 100], [0.9, 0.1])
    assert d.gittins(variant="bucketed") == pytest.approx((0.9 + 0.1 * 10) / 0.9)
    assert d.gittins(variant="hermes_artifact") == pytest.approx(1 / 0.9)


def test_the_artifact_forgets_jobs_that_do_not_finish():
    """{1: 0.1, 100: 0.9}: stopping at 10 costs (0.1 + 9) / 0.1, of which it counts 0.1 / 0.1^2."""
    d = Distribution([1, 100], [0.1, 0.9])
    assert d.gittins(variant="hermes_artifact") == pytest.approx(10.0)
    assert d.gittins(variant="bucketed") == d.mean() == pytest.approx(90.1)


def test_only_the_artifact_ranks_0_beyond_the_samples():
    d = Distribution([1, 4], [1, 9])  # both quartiles are 4: no grid
    for variant in RANKS:
        beyond = [d.gittins(age, variant=variant) for age in (5.0, 50.0)]
        assert beyond == ([0.0, 0.0] if variant == "hermes_artifact" else [4.0, 32.0])


@pytest.mark.parametrize(
    ("sample", "true_rank"),
    [
        (lambda g: g.exponential(1.0, 2000), lambda age: 1.0),
        (lambda g: g.uniform(0.0, 2.0, 2000), lambda age: (2.0 - age) / 2),
    ],
    ids=["exponential", "uniform"],
)
def test_the_grid_takes_the_noise_from_the_rank_of_random_samples(sample, true_rank):
    """At ages picked at random the raw rank is off by a factor of 1.6 or more, the shifted 1.1."""
    errors = []
    for seed in range(5):
        generator = np.random.default_rng(seed)
        d = Distribution(sample(generator))
        for age in generator.uniform(0.0, 1.6, 20):
            told = [d.gittins(age), d.gittins(age, variant="shifted")]
            errors.append(np.abs(np.log(np.divide(told, true_rank(age)))))
    raw, shifted = np.exp(np.mean(errors, axis=0))
    assert raw > 1.6
    assert shifted < 1.1


@pytest.mark.parametrize("make", [RankTable, lambda d, **kwargs: d.gittins(**kwargs)])
def test_bad_ranks_are_refused(make):
    d = Distribution([1.0])
    with pytest.raises(DemandError, match="'magic'; expected one of gittins, shifted, bucketed"):
        make(d, variant="magic")
    for variant in ("bucketed", "hermes_artifact", "mean"):
        with pytest.raises(
            DemandError, match=f"'{variant}' knows no quantum .* use gittins or shift"
        ):
            make(d, variant=variant, quantum=1.0)
        with pytest.raises(DemandError, match=r"preemption_cost \(1.0\); leave both at 0"):
            make(d, variant=variant, preemption_cost=1.0)
    with pytest.raises(DemandError, match=r"quantum is -1.0; expected finite seconds"):
        make(d, quantum=-1.0)
    with pytest.raises(DemandError, match=r"preemption_cost is nan"):
        make(d, variant="shifted", preemption_cost=float("nan"))
