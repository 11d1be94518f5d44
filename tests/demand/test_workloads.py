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
from demand.units import CostModel, Execution, Unit
from demand.workloads import (
    DEADLINE_FACTORS,
    heavy_tailed_applications,
    heavy_tailed_mix,
    recorded_applications,
    with_arrivals,
    with_deadlines,
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


def test_hermes_jobs_come_with_their_runs(hermes):
    workload = poisson_workload(hermes, 0.8, 200, seed=3)
    cost = CostModel()
    assert workload.runs is not None
    assert [cost.run_seconds(run) for run in workload.runs] == workload.demands.tolist()
    for name, run in zip(workload.applications, workload.runs, strict=True):
        assert {e.unit for e in run} <= set(workload.graphs[name].units)


@pytest.mark.parametrize(("tail", "mean"), [("lognormal", 7.389), ("pareto", 7.381)])
def test_heavy_tails(tail, mean):
    agent, report = heavy_tailed_applications(tail)
    assert agent.true_mean_seconds == pytest.approx(mean, abs=0.001)
    drawn = agent.demands(np.random.default_rng(0), 4_000_000)
    assert drawn.mean() == pytest.approx(mean, rel=0.02)
    assert np.sort(drawn)[-40_000:].sum() > 0.15 * drawn.sum()  # a hundredth of the jobs
    assert report.demands(np.random.default_rng(0), 10_000).mean() == pytest.approx(8.0, rel=0.02)


def test_on_heavy_tails_class_mean_learns_nothing_and_gittins_much():
    for tail in ("lognormal", "pareto"):
        workloads = [heavy_tailed_mix(0.8, 4000, seed, tail=tail) for seed in range(4)]
        mean = {
            type(p): np.mean([simulate(w, p).mean for w in workloads])
            for p in (ClassMean(), Gittins(), Oracle())
        }
        assert mean[Oracle] < mean[Gittins] < 0.5 * mean[ClassMean]


RUNS = [[Execution(Unit("work", "tool"), seconds=float(n))] * (1 + n % 3) for n in range(1, 41)]


def test_recorded_jobs_are_not_those_the_scheduler_learned_from():
    (app,) = recorded_applications({"a": RUNS}, training_share=0.25, seed=5)
    workload = poisson_workload([app], 0.7, 500, seed=1)
    cost = CostModel()
    learned = {cost.run_seconds(run) for run in RUNS} & set(app.distribution.values.tolist())
    served = set(workload.demands.tolist())
    seconds = {run[0].seconds for run in workload.runs}
    trained = {e.seconds for e in app.graph.samples("work")}
    assert not seconds & trained
    assert len(seconds | trained) == 40
    assert len(trained) == 10
    assert len(learned) + len(served) <= 40
    rest = [cost.run_seconds(run) for run in RUNS if run[0].seconds not in trained]
    assert app.true_mean_seconds == pytest.approx(np.mean(rest))
    again = recorded_applications({"a": RUNS}, training_share=0.25, seed=5)[0]
    assert again.distribution == app.distribution
    other = recorded_applications({"a": RUNS}, training_share=0.25, seed=6)[0]
    assert other.distribution != app.distribution


def seconds_of(application, n=400):
    return set(application.demands(np.random.default_rng(0), n).tolist())


def test_a_split_by_time_learns_from_the_past_alone():
    (app,) = recorded_applications({"a": RUNS}, training_share=0.25, split="time")
    cost = CostModel()
    totals = [cost.run_seconds(run) for run in RUNS]
    assert app.distribution == Distribution(totals[:10])
    assert seconds_of(app) == set(totals[10:])
    assert app.mean_seconds == pytest.approx(np.mean(totals[10:]))
    assert app.graph.runs == tuple(tuple(run) for run in RUNS[:10])
    again = recorded_applications({"a": RUNS}, training_share=0.25, split="time", seed=9)[0]
    assert again.distribution == app.distribution


def test_a_split_of_ones_own_is_taken_as_it_is():
    """Of two files, say: the weight is what there is to serve."""
    cost = CostModel()
    apps = recorded_applications(
        train={"a": RUNS[:3], "b": RUNS[3:5]}, test={"b": RUNS[5:9], "a": RUNS[9:10]}, known="graph"
    )
    assert {app.name: app.weight for app in apps} == {"b": 4.0, "a": 1.0}
    served = {app.name: seconds_of(app) for app in apps}
    assert served["a"] == {cost.run_seconds(RUNS[9])}
    assert served["b"] == {cost.run_seconds(run) for run in RUNS[5:9]}
    assert {app.name: len(app.graph.runs) for app in apps} == {"b": 2, "a": 3}


def test_recorded_applications_by_graph_and_by_weight():
    known = recorded_applications({"a": RUNS, "b": RUNS[:10]}, known="graph")
    assert [app.weight for app in known] == [40.0, 10.0]
    assert known[0].distribution == known[0].graph.remaining()
    cheap = recorded_applications(
        {"a": [[Execution(Unit("call", "llm"), 100, 10)]] * 4},
        cost=CostModel(0.0, 0.5),
    )
    assert poisson_workload(cheap, 0.5, 3).demands.tolist() == [5.0] * 3


def test_arrivals_of_a_trace_keep_jobs_load_and_order():
    workload = with_deadlines(bimodal_mix(0.8, 100, seed=2), 2.0)
    times = 50.0 + np.repeat(np.arange(60.0), 3)  # three at a time
    moved = with_arrivals(workload, times)
    assert moved.arrivals[-1] == pytest.approx(workload.arrivals[-1])
    intervals = np.diff(moved.arrivals)
    step = intervals.max()
    assert set(np.round(intervals / step, 9)) == {0.0, 1.0}
    assert (intervals[:3] / step).round(9).tolist() == [0.0, 1.0, 0.0]
    np.testing.assert_array_equal(moved.demands, workload.demands)
    np.testing.assert_allclose(
        moved.deadlines - moved.arrivals, workload.deadlines - workload.arrivals, atol=1e-6
    )
    assert moved.applications == workload.applications


def test_resampled_intervals_keep_their_spread_alone():
    workload = bimodal_mix(0.8, 5000, seed=2)
    times = np.cumsum(np.random.default_rng(0).gamma(0.2, size=300))
    moved = with_arrivals(workload, times, "resampled", seed=4)
    intervals, recorded = np.diff(moved.arrivals), np.diff(times)
    assert moved.arrivals[-1] == pytest.approx(workload.arrivals[-1])
    assert intervals.std() / intervals.mean() == pytest.approx(
        recorded.std() / recorded.mean(), rel=0.1
    )
    same = with_arrivals(workload, times, "resampled", seed=4)
    np.testing.assert_array_equal(moved.arrivals, same.arrivals)


def test_deadlines_follow_demand_or_mean(hermes):
    workload = poisson_workload(hermes, 0.8, 300)
    for factor in DEADLINE_FACTORS.values():
        due = with_deadlines(workload, factor).deadlines - workload.arrivals
        np.testing.assert_allclose(due, factor * workload.demands, rtol=1e-6)
    due = with_deadlines(workload, 1.5, of="mean").deadlines - workload.arrivals
    means = [workload.distributions[name].mean() for name in workload.applications]
    np.testing.assert_allclose(due, 1.5 * np.array(means), rtol=1e-6)


def test_a_larger_share_of_deadlines_adds_to_a_smaller_one():
    workload = bimodal_mix(0.8, 2000)
    few, more = (np.isfinite(with_deadlines(workload, 2.0, share=s).deadlines) for s in (0.2, 0.5))
    assert few.mean() == pytest.approx(0.2, abs=0.04)
    assert more[few].all()
    assert not np.isfinite(with_deadlines(workload, 2.0, share=0.0).deadlines).any()


def test_ready_mixes_are_poisson_workloads():
    for mix in (hermes_mix, bimodal_mix, heavy_tailed_mix):
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


def generator(**stages):
    return RunGenerator({name: Stage("tool", then, seconds=1.0) for name, then in stages.items()})


KNOWN = {"a": Distribution([1.0])}
TWO = bimodal_mix(0.8, 2)


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
        (lambda: heavy_tailed_mix(tail="weibull"), "tail is 'weibull'; expected one of lognormal"),
        (
            lambda: Application("a", KNOWN["a"], len, 1.0, sample_runs=len),
            "samplers of demands and of runs",
        ),
        (lambda: Application("a", KNOWN["a"], sample_runs=len), "no mean_seconds"),
        (lambda: recorded_applications({}), "there are no applications"),
        (lambda: recorded_applications({"a": RUNS[:1]}), "'a' has 1 runs, of which 0"),
        (lambda: recorded_applications({"a": RUNS}, training_share=1.0), "of which 40"),
        (lambda: recorded_applications({"a": RUNS}, known="all"), "known is 'all'"),
        (lambda: recorded_applications({"a": RUNS}, split="later"), "split is 'later'; expected"),
        (lambda: recorded_applications(), "give runs, or both train and test"),
        (lambda: recorded_applications(train={"a": RUNS}), "give runs, or both train and test"),
        (lambda: recorded_applications({"a": RUNS}, test={"a": RUNS}), "runs are given, and train"),
        (
            lambda: recorded_applications(train={"a": RUNS}, test={"b": RUNS}),
            "test has no runs of 'a'; expected the same applications",
        ),
        (
            lambda: recorded_applications(train={"a": []}, test={"a": RUNS}),
            "train has no runs of 'a'",
        ),
        (lambda: recorded_applications(train={"a": RUNS}, test={}), "test has no applications"),
        (
            lambda: recorded_applications(train={"a": RUNS}, test={"a": RUNS}, split="time"),
            "train and test are given, and a training_share or a split",
        ),
        (
            lambda: recorded_applications(train={"a": RUNS}, test={"a": [RUNS[0][0]]}),
            r"test\['a'\]\[0\] is a single execution",
        ),
        (lambda: with_arrivals(TWO, [0.0, 1.0]), "2 jobs and 1 intervals; take fewer"),
        (lambda: with_arrivals(TWO, [1.0, 1.0]), "not all equal"),
        (lambda: with_arrivals(TWO, [1.0, 0.0]), "expected ascending"),
        (lambda: with_arrivals(TWO, [0.0, np.nan]), "finite seconds"),
        (lambda: with_arrivals(TWO, 3.0), "expected ascending"),
        (lambda: with_arrivals(TWO, [0.0, 0.0, 0.0, 1.0]), "first 2 intervals are all 0"),
        (lambda: with_arrivals(TWO, [0.0, 1.0], "shuffled"), "order is 'shuffled'"),
        (lambda: with_deadlines(TWO, 0.0), "factor is 0.0"),
        (lambda: with_deadlines(TWO, 1.5, share=1.5), "share is 1.5"),
        (lambda: with_deadlines(TWO, 1.5, of="median"), "of is 'median'; expected mean or demand"),
        (lambda: RunGenerator({}), "there are no stages"),
        (lambda: generator(a={"a": 1.0}), "from a the end cannot be reached"),
        (
            lambda: generator(a={"b": 0.5, "end": 0.5}, b={"c": 1.0}, c={"b": 1.0, "end": 0.0}),
            "from b, c the end cannot be reached",
        ),
        (lambda: generator(a={"end": 0.3}), r"'a' goes on with .*0\.3.; expected .* sum is 1"),
        (lambda: generator(a={"a": -0.5, "end": 1.5}), "expected numbers of at least 0"),
        (lambda: generator(a={"a": float("nan"), "end": 1.0}), "expected numbers of at least 0"),
        (lambda: generator(a={"b": 0.5, "end": 0.5}), r"'a' leads to \['b'\], which are no stages"),
        (lambda: hermes_generator("gpt"), "'gpt'; expected one of got_docmerge"),
    ],
)
def test_bad_input_is_refused(make, says):
    with pytest.raises(DemandError, match=says):
        make()
