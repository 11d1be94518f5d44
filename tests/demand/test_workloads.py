import numpy as np
import pytest

from demand import (
    FCFS,
    SERPT,
    Application,
    ClassMean,
    DemandError,
    Distribution,
    Gittins,
    Oracle,
    RandomOrder,
    Workload,
    bimodal_applications,
    bimodal_mix,
    hermes_applications,
    hermes_mix,
    poisson_workload,
    simulate,
)
from demand.workloads.hermes import hermes_generator
from demand.workloads.runs import RunGenerator, Stage

# From the profiles in the artifact: mean seconds, coefficient of variation.
HERMES = {
    "got_docmerge": (2030.0, 0.35),
    "langchain_mapreduce": (313.0, 0.27),
    "hugginggpt": (61.0, 0.31),
    "code_feedback": (58.0, 0.96),
    "factool_kbqa": (41.0, 0.22),
    "factool_code": (38.0, 0.13),
    "react_alfw": (9.5, 0.94),
    "factool_math": (8.9, 0.17),
    "react_fever": (6.5, 0.90),
}


@pytest.fixture(scope="module")
def hermes():
    return hermes_applications(training_runs=400)


@pytest.mark.parametrize("name", HERMES)
def test_hermes_runs_have_the_mean_and_spread_of_the_table(name):
    mean, cv = HERMES[name]
    demands = hermes_generator(name).demands(np.random.default_rng(0), 3000)
    assert demands.mean() == pytest.approx(mean, rel=4 * cv / np.sqrt(3000) + 0.01)
    assert demands.std() / demands.mean() == pytest.approx(cv, rel=0.12)


def test_hermes_graphs_learn_what_the_runs_do(hermes):
    assert {a.name for a in hermes} == set(HERMES)
    for app in hermes:
        mean, cv = HERMES[app.name]
        # A window of 1000 samples remembers few runs of a unit that loops often.
        runs = 60 if app.name == "react_alfw" else 400
        training_error = 4 * cv / np.sqrt(runs) + 4 * cv / np.sqrt(1000)
        assert app.distribution.mean() == pytest.approx(mean, rel=training_error)
    loops = {a.name: a.graph for a in hermes}["react_alfw"].branches("thought")
    assert loops["thought"] == pytest.approx(0.94, abs=4 * np.sqrt(0.94 * 0.06 / 1000))


def test_on_the_hermes_mix_class_mean_gets_what_gittins_gets(hermes):
    workloads = [poisson_workload(hermes, 0.7, 4000, seed) for seed in range(3)]
    mean = {
        type(p): np.mean([simulate(w, p).mean for w in workloads])
        for p in (FCFS(), ClassMean(), SERPT(), Gittins(), Oracle())
    }
    assert mean[Gittins] < 0.3 * mean[FCFS]
    assert mean[ClassMean] < 1.05 * mean[Gittins]
    assert mean[Oracle] < mean[Gittins] < 1.15 * mean[Oracle]


def test_on_the_bimodal_mix_gittins_beats_class_mean_clearly():
    apps = bimodal_applications()
    workloads = [poisson_workload(apps, 0.8, 4000, seed) for seed in range(3)]
    mean = {
        type(p): np.mean([simulate(w, p).mean for w in workloads])
        for p in (FCFS(), RandomOrder(), ClassMean(), Gittins(), Oracle())
    }
    assert mean[Oracle] < mean[Gittins] < 0.6 * mean[ClassMean] < 0.6 * mean[FCFS]


def test_ready_mixes_are_poisson_workloads():
    for mix in (hermes_mix, bimodal_mix):
        workload = mix(0.8, 500, seed=4, servers=2)
        again = mix(0.8, 500, seed=4, servers=2)
        assert len(workload) == 500
        np.testing.assert_array_equal(workload.arrivals, again.arrivals)
        np.testing.assert_array_equal(workload.demands, again.demands)
        assert workload.distributions == again.distributions


def test_load_is_arrival_rate_times_mean_demand():
    app = Application("a", Distribution([2.0, 4.0], [3, 1]))
    workload = poisson_workload([app], 0.6, 50_000, servers=3)
    rate = len(workload) / workload.arrivals[-1]
    assert rate * 2.5 / 3 == pytest.approx(0.6, rel=0.02)
    assert workload.demands.mean() == pytest.approx(2.5, rel=0.02)
    gaps = np.diff(workload.arrivals)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.02)


def test_random_numbers_are_common_to_all_loads():
    low, high = bimodal_mix(0.4, 300, seed=9), bimodal_mix(0.8, 300, seed=9)
    np.testing.assert_array_equal(low.demands, high.demands)
    np.testing.assert_allclose(low.arrivals, 2 * high.arrivals)
    assert low.applications == high.applications
    assert not np.array_equal(low.demands, bimodal_mix(0.4, 300, seed=10).demands)


def test_weights_set_the_shares():
    apps = [
        Application("a", Distribution([1.0]), weight=3.0),
        Application("b", Distribution([2.0])),
    ]
    workload = poisson_workload(apps, 0.5, 20_000)
    assert workload.applications.count("a") / 20_000 == pytest.approx(0.75, abs=0.02)


def test_a_workload_cannot_be_changed():
    arrivals = np.array([0.0, 1.0])
    workload = Workload(arrivals, [1.0, 1.0], ["a", "a"], {"a": Distribution([1.0])})
    arrivals[0] = 0.5
    assert workload.arrivals[0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        workload.demands[0] = 3.0


def test_expected_seconds_of_a_generator_by_hand():
    """Two rounds on average of 3 calls of 2 s, then 5 s: 17 s, times 2."""
    stages = {
        "work": Stage("tool", {"work": 0.5, "report": 0.5}, calls=3, seconds=2.0),
        "report": Stage("human", {"end": 1.0}, seconds=5.0),
    }
    generator = RunGenerator(stages, scale=2.0, spread=0.0, call_spread=0.0)
    assert generator.mean_seconds() == pytest.approx(34.0)
    demands = generator.demands(np.random.default_rng(0), 2000)
    assert set((demands - 10.0) % 12.0) == {0.0}
    assert demands.mean() == pytest.approx(34.0, abs=4 * 12.0 * np.sqrt(2 / 2000))


KNOWN = {"a": Distribution([1.0])}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Workload([], [], [], KNOWN), "n at least 1"),
        (lambda: Workload([0, 1], [1], ["a", "a"], KNOWN), "2 arrivals and 1 demands"),
        (lambda: Workload([1, 0], [1, 1], ["a", "a"], KNOWN), r"arrivals\[1\] is 0.0"),
        (lambda: Workload([0], [-1], ["a"], KNOWN), "demands has a negative"),
        (lambda: Workload([np.nan], [1], ["a"], KNOWN), "arrivals has a negative or non-finite"),
        (lambda: Workload([0], [1], ["b"], KNOWN), r"\['b'\] have no distribution"),
        (lambda: Application("a", KNOWN["a"], weight=0.0), "weight of application 'a' is 0.0"),
        (lambda: Application("a", Distribution([0.0])), "mean_seconds of application 'a' is 0.0"),
        (lambda: Application("a", KNOWN["a"], lambda rng, n: np.ones(n)), "no mean_seconds"),
        (lambda: poisson_workload([], 0.5, 1), "expected distinct names"),
        (lambda: bimodal_mix(load=0.0), "load is 0.0"),
        (lambda: bimodal_mix(jobs=0), "jobs is 0"),
        (lambda: bimodal_mix(servers=0), "servers is 0"),
        (lambda: hermes_generator("gpt"), "'gpt'; expected one of got_docmerge"),
    ],
)
def test_bad_input_is_refused(make, says):
    with pytest.raises(DemandError, match=says):
        make()
