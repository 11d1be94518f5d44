"""Simulated queues against the formulas of queueing theory.

Each check draws independent replications (fixed seeds), forms the 99 % Student interval of their
mean, and asks that the formula lie in it. The first tenth of every run is left out, the queue
having started empty. References: Pollaczek-Khinchine, E[T] = E[S] + load E[S^2] / 2 (1 - rho);
the values for SRPT and least-attained-service are integrals of their formulas for mean service 1.
"""

import numpy as np
import pytest
from scipy import stats

from demand import (
    FCFS,
    SERPT,
    Application,
    ClassMean,
    Distribution,
    Gittins,
    Oracle,
    RandomOrder,
    Workload,
    poisson_workload,
    simulate,
)
from tests.demand.strategies import hyperexponential_quantile, quantile_grid


def hyperexponential(rng, n):
    return rng.exponential(np.where(rng.random(n) < 0.9, 0.5, 5.5))


EXPONENTIAL = Application(
    "exponential",
    quantile_grid(lambda q: -np.log1p(-q), 200),
    lambda rng, n: rng.exponential(size=n),
    1.0,
)
CONSTANT = Application("constant", Distribution([1.0]))
HYPER = Application(
    "hyperexponential", quantile_grid(hyperexponential_quantile, 200), hyperexponential, 1.0
)
SECOND_MOMENT = {"exponential": 2.0, "constant": 1.0, "hyperexponential": 6.5}


def pollaczek_khinchine(load: float, second_moment: float) -> float:
    return 1.0 + load * second_moment / (2.0 * (1.0 - load))


def settled(workload: Workload, policy, servers: int = 1) -> float:
    completion_times = simulate(workload, policy, servers).completion_times
    return float(completion_times[len(workload) // 10 :].mean())


def means(app, policy, load, jobs, replications, servers=1) -> np.ndarray:
    return np.array(
        [
            settled(poisson_workload([app], load, jobs, seed, servers), policy, servers)
            for seed in range(replications)
        ]
    )


def interval(values: np.ndarray) -> tuple[float, float]:
    half = stats.t.ppf(0.995, len(values) - 1) * stats.sem(values)
    return values.mean() - half, values.mean() + half


def assert_in_interval(expected: float, values: np.ndarray) -> None:
    low, high = interval(values)
    assert low <= expected <= high, (expected, low, high)
    assert high - low < 0.4 * expected  # an interval that can tell something


@pytest.mark.parametrize("load", [0.5, 0.8])
@pytest.mark.parametrize("app", [EXPONENTIAL, CONSTANT, HYPER], ids=lambda app: app.name)
def test_fcfs_is_pollaczek_khinchine(app, load):
    expected = pollaczek_khinchine(load, SECOND_MOMENT[app.name])
    assert_in_interval(expected, means(app, FCFS(), load, 10_000, 20))


def test_the_reference_values_of_pollaczek_khinchine():
    assert pollaczek_khinchine(0.8, 2.0) == pytest.approx(5.0)
    assert pollaczek_khinchine(0.8, 1.0) == pytest.approx(3.0)
    assert pollaczek_khinchine(0.8, 6.5) == pytest.approx(14.0)


@pytest.mark.parametrize(("load", "expected"), [(0.5, 1.4254), (0.8, 2.3528)])
def test_the_oracle_on_m_m_1_is_srpt(load, expected):
    assert_in_interval(expected, means(EXPONENTIAL, Oracle(), load, 10_000, 20))


@pytest.mark.parametrize("policy", [ClassMean(), RandomOrder()], ids=lambda p: type(p).__name__)
def test_blind_orders_of_m_m_1_share_one_mean(policy):
    assert_in_interval(2.0, means(EXPONENTIAL, policy, 0.5, 10_000, 20))


def test_constant_demand_makes_gittins_fcfs():
    """Never preempted, a constant demand is served in order of arrival."""
    workload = poisson_workload([CONSTANT], 0.8, 2000, 0)
    for policy in (Gittins(), SERPT(), Oracle()):
        np.testing.assert_allclose(
            simulate(workload, policy).completion_times,
            simulate(workload, FCFS()).completion_times,
        )


def test_two_servers_are_erlang_c():
    """M/M/2: E[T] = 1 + C / 2 (1 - rho), C = 2 rho^2 / (1 + rho) the chance to wait."""
    expected = 1.0 + (2 * 0.7**2 / 1.7) / (2 * 0.3)
    assert_in_interval(expected, means(EXPONENTIAL, FCFS(), 0.7, 10_000, 20, servers=2))


@pytest.mark.slow
def test_gittins_on_falling_hazard_is_least_attained_service():
    """Hyperexponential at load 0.8: FCFS 14, least attained service = Gittins 3.7310.

    The scheduler knows 60 quantiles of the demand. The mean of the oracle on the same jobs, whose
    expectation is known to be 2.1847, is a control variate: it takes out the luck of the draw.
    """
    known = quantile_grid(hyperexponential_quantile, 60)
    app = Application("hyperexponential", known, hyperexponential, 1.0)
    values = means(app, Gittins(), 0.8, 8000, 12)
    control = means(app, Oracle(), 0.8, 8000, 12)
    slope = np.cov(values, control)[0, 1] / control.var(ddof=1)
    low, high = interval(values - slope * (control - 2.1847))
    assert low <= 3.7310 <= high
    assert high - low < 0.05 * 3.7310
    assert values.max() < means(app, FCFS(), 0.8, 8000, 12).min()


def test_no_order_beats_the_oracle_on_average():
    apps = [HYPER, Application("fixed", Distribution([3.0]))]
    policies = [FCFS(), RandomOrder(), ClassMean(), SERPT(), Gittins()]
    workloads = [poisson_workload(apps, 0.8, 4000, seed) for seed in range(4)]
    oracle = np.mean([settled(w, Oracle()) for w in workloads])
    gittins = np.mean([settled(w, Gittins()) for w in workloads])
    for policy in policies:
        mean = np.mean([settled(w, policy) for w in workloads])
        assert oracle < mean
        assert gittins <= mean * 1.01
