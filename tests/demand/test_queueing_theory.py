"""Simulated queues against the formulas of queueing theory.

Each check draws independent replications (fixed seeds), forms the 99 % Student interval of their
mean, and asks that the formula lie in it. The first tenth of every run is left out, the queue
having started empty. Formulas, for mean service 1: Pollaczek-Khinchine for first come, first
served; Schrage and Miller for SRPT; Kleinrock for least attained service; Erlang for k servers.
Where the luck of the draw would hide everything, the mean under another policy on the same jobs,
whose expectation is a formula too, is taken out as a control variate.
"""

import math
from functools import partial

import numpy as np
import pytest
from scipy import integrate, stats

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
from demand.policies import LAS
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
DENSITY = {
    "exponential": lambda x: math.exp(-x),
    "hyperexponential": lambda x: 1.8 * math.exp(-x / 0.5) + 0.1 / 5.5 * math.exp(-x / 5.5),
}
LOADS = [0.5, 0.8, 0.9]
# A light load and one at which the order matters; what varies more needs more jobs at 0.9.
by_load = pytest.mark.parametrize(("load", "at"), [(0.5, 0), (0.8, 1)])
SRPT_MEANS = {"exponential": [1.4254, 2.3528, 3.5521], "hyperexponential": [1.4047, 2.1847, 3.0947]}
LAS_MEANS = {"exponential": [2.0, 5.0, 10.0], "hyperexponential": [1.7602, 3.7310, 6.7888]}


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


def assert_in_interval(expected: float, values: np.ndarray, width: float = 0.4) -> None:
    low, high = interval(values)
    assert low <= expected <= high, (expected, low, high)
    assert high - low < width * expected  # an interval that can tell something


def controlled(values: np.ndarray, control: np.ndarray, expected: float) -> np.ndarray:
    """`values` less what `control`, of known expectation, says was luck."""
    slope = np.cov(values, control)[0, 1] / control.var(ddof=1)
    return values - slope * (control - expected)


@pytest.mark.parametrize("load", [0.5, 0.8])
@pytest.mark.parametrize("app", [EXPONENTIAL, CONSTANT, HYPER], ids=lambda app: app.name)
def test_fcfs_is_pollaczek_khinchine(app, load):
    expected = pollaczek_khinchine(load, SECOND_MOMENT[app.name])
    assert_in_interval(expected, means(app, FCFS(), load, 10_000, 20))


def test_the_reference_values_of_pollaczek_khinchine():
    for load, exponential, constant, hyper in (
        (0.5, 2, 1.5, 4.25),
        (0.8, 5, 3, 14),
        (0.9, 10, 5.5, 30.25),
    ):
        assert pollaczek_khinchine(load, 2.0) == pytest.approx(exponential)
        assert pollaczek_khinchine(load, 1.0) == pytest.approx(constant)
        assert pollaczek_khinchine(load, 6.5) == pytest.approx(hyper)


@pytest.mark.parametrize("name", DENSITY)
def test_the_reference_values_of_srpt_and_of_least_attained_service(name):
    """E[T] of SRPT and of LAS as integrals over the demand x, on a grid up to where all is done."""
    x = np.concatenate([np.linspace(0.0, 2.0, 20_001), np.linspace(2.0, 120.0, 60_001)[1:]])
    f = np.array([DENSITY[name](t) for t in x])
    below = partial(integrate.cumulative_simpson, x=x, initial=0.0)
    survival = 1.0 - below(f)
    for load, srpt, las in zip(LOADS, SRPT_MEANS[name], LAS_MEANS[name], strict=True):
        small = load * below(x * f)
        waiting = load * (below(x * x * f) + x * x * survival) / (2 * (1 - small) ** 2)
        assert integrate.simpson(f * (waiting + below(1 / (1 - small))), x=x) == pytest.approx(
            srpt, abs=2e-4
        )
        cut = load * below(survival)  # load of demands cut off at x; E[min(X, x)^2] likewise
        waiting = load * 2 * below(x * survival) / (2 * (1 - cut) ** 2)
        assert integrate.simpson(f * (waiting + x / (1 - cut)), x=x) == pytest.approx(las, abs=2e-4)


@by_load
@pytest.mark.parametrize("app", [EXPONENTIAL, HYPER], ids=lambda app: app.name)
def test_the_oracle_is_srpt_and_least_attained_service_is_kleinrocks_formula(app, load, at):
    """Each is the other's control variate."""
    oracle, las = (means(app, policy, load, 5000, 20) for policy in (Oracle(), LAS(0.1)))
    srpt_mean, las_mean = SRPT_MEANS[app.name][at], LAS_MEANS[app.name][at]
    assert_in_interval(srpt_mean, controlled(oracle, las, las_mean), 0.15)
    assert_in_interval(las_mean, controlled(las, oracle, srpt_mean), 0.15)


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


@pytest.mark.parametrize(("servers", "load"), [(2, 0.8), (3, 0.5), (8, 0.8)])
def test_m_m_k_is_erlang_c(servers, load):
    """E[T] = 1 + C / k (1 - rho), C being Erlang's chance to wait."""
    offered = servers * load
    waits = offered**servers / math.factorial(servers) / (1 - load)
    idle = sum(offered**n / math.factorial(n) for n in range(servers))
    expected = 1.0 + waits / (waits + idle) / (servers * (1 - load))
    assert_in_interval(expected, means(EXPONENTIAL, FCFS(), load, 10_000, 20, servers))


def test_gittins_on_falling_hazard_is_least_attained_service():
    """Hyperexponential, whose hazard rate falls; the scheduler knows 60 quantiles of it."""
    known = quantile_grid(hyperexponential_quantile, 60)
    app = Application("hyperexponential", known, hyperexponential, 1.0)
    values, control = (means(app, policy, 0.8, 5000, 20) for policy in (Gittins(), Oracle()))
    expected = LAS_MEANS["hyperexponential"][1]
    corrected = controlled(values, control, SRPT_MEANS["hyperexponential"][1])
    assert_in_interval(expected, corrected, 0.15)


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
