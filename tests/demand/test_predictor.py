"""What is predicted from a call before its first token: by whom, for whom, and how well."""

import numpy as np
import pytest

from demand import (
    NEVER_SEEN,
    CostModel,
    DemandError,
    DemandEstimator,
    Distribution,
    Execution,
    PDGraph,
    PendingCall,
    Predictor,
    Progress,
    ProgressRegression,
    PromptRegression,
    Unit,
    Workload,
    calibrate,
    calibrate_calls,
    simulate,
    simulate_cluster,
    simulate_engine,
)
from demand.policies import SERPT, Oracle
from demand.refine import CurrentUnit, LogRidge

ASK, SEARCH = Unit("ask", "llm"), Unit("search", "search")
COST = CostModel(prefill_seconds_per_token=0.001, decode_seconds_per_token=0.1)


def told_runs(n, seed=0):
    """The longer the prompt, the more is generated; a search follows half of the calls."""
    rng = np.random.default_rng(seed)
    runs = []
    for _ in range(n):
        prompt = int(rng.integers(10, 1000))
        generated = max(int(prompt * rng.uniform(0.8, 1.2)), 1)
        searched = [Execution(SEARCH, seconds=1.0)] if rng.random() < 0.5 else []
        runs.append([Execution(ASK, prompt, generated), *searched])
    return runs


def graph(n=300, seed=0):
    return PDGraph.fit(told_runs(n, seed), cost=COST)


def pending(tokens, **more):
    return PendingCall("a", ASK, tokens, **more)


def test_the_length_of_the_prompt_tells_how_much_is_left():
    refined = PromptRegression().fit(graph())
    short, long = (refined.predict(pending(tokens)) for tokens in (30, 900))
    assert short.mean() == pytest.approx(0.1 * 30 + 0.5, rel=0.3)
    assert long.mean() == pytest.approx(0.1 * 900 + 0.9 + 0.5, rel=0.15)
    held_out = told_runs(200, seed=1)
    blind = calibrate(refined.remaining, held_out, cost=COST).points[0]
    told = calibrate_calls(refined, "a", held_out, cost=COST).points[0]
    assert told.runs == blind.runs == 200
    assert told.crps < 0.3 * blind.crps
    assert abs(told.coverage[1] - 0.8) < 0.1


def test_without_a_call_or_its_tokens_it_is_the_regression_on_progress():
    refined, plain = (each.fit(graph()) for each in (PromptRegression(), ProgressRegression()))
    after = Progress(told_runs(1)[0][:1])
    for progress in (Progress(), after):
        assert refined.remaining(progress) == plain.remaining(progress)
        call = pending(None, progress=progress)
        assert refined.predict(call) == plain.remaining(progress)
    measured = PDGraph.fit([[Execution(ASK, seconds=float(s))] for s in range(1, 9)])
    untold = PromptRegression().fit(measured)
    assert untold.predict(pending(50)) == untold.remaining(Progress())


def test_the_regression_is_that_of_plain_least_squares_on_the_calls():
    """The twin builds a row a call by hand, and solves once for all."""
    known = graph(80)
    refined = PromptRegression(ridge=2.0).fit(known)
    rows, y = [], []
    for run in known.runs:
        before = refined.features.of_progress(Progress())
        ahead = [np.log1p(run[0].input_tokens), np.log(2.0), 1.0, 0.0]
        rows.append([*before, *ahead])
        y.append(np.log(sum(map(COST.seconds, run))))
    x, y = np.array(rows), np.array(y)
    scale = x.std(axis=0)
    z = (x - x.mean(axis=0)) / np.where(scale > 1e-9, scale, np.inf)
    slopes = np.linalg.solve(z.T @ z + 2.0 * np.eye(x.shape[1]), z.T @ (y - y.mean()))
    np.testing.assert_allclose(refined.predicted.fitted(x), y.mean() + z @ slopes, atol=1e-9)


def test_most_refinements_do_not_look_at_the_call():
    refined = CurrentUnit().fit(graph())
    assert refined.predict(pending(900)) == refined.remaining(Progress())


def test_an_estimator_is_a_predictor():
    estimator = DemandEstimator({"a": graph()}, PromptRegression())
    assert isinstance(estimator, Predictor)
    assert estimator.predict(pending(30)).mean() < 0.1 * estimator.predict(pending(900)).mean()
    assert not estimator.fallbacks
    assert estimator.predict(PendingCall("a", Unit("new", "llm"), 9)).mean() > 0.0
    assert estimator.predict(PendingCall("b", ASK, 9)) == NEVER_SEEN
    assert estimator.fallbacks == {("a", "unit"): 1, ("b", "application"): 1}


def workload(runs):
    demands = [sum(map(COST.seconds, run)) for run in runs]
    arrivals = np.cumsum(np.random.default_rng(2).exponential(np.mean(demands) / 0.8, len(runs)))
    known = graph()
    return Workload(
        arrivals, demands, ["a"] * len(runs), {"a": known.remaining()}, runs=runs,
        graphs={"a": known},
    )  # fmt: skip


def test_a_queue_is_told_before_the_first_token():
    jobs = workload(told_runs(300, seed=3))
    estimator = DemandEstimator(jobs.graphs, PromptRegression())
    blind, told = (simulate(jobs, SERPT(), predictor=each) for each in (None, estimator))
    oracle = simulate(jobs, Oracle())
    assert blind.mean - told.mean > 0.8 * (blind.mean - oracle.mean) > 0.0


def test_a_queue_asks_at_arrival_and_between_units_where_a_call_follows():
    class Noting:
        asked: list

        def predict(self, call):
            self.asked.append((call.unit.name, call.input_tokens, len(call.progress.executed)))
            return Distribution([5.0])

    predictor = Noting()
    predictor.asked = []
    call, found = Execution(ASK, 10, 20), Execution(SEARCH, seconds=1.0)
    simulate(workload([[call, found, call], [found]]), SERPT(), predictor=predictor)
    assert predictor.asked == [("ask", 10.0, 0), ("ask", 10.0, 2)]


class Mistaken:
    def predict(self, call):
        return 3.0


def test_what_is_no_predictor_or_no_call_is_refused():
    jobs = workload(told_runs(3))
    for serve in (simulate, simulate_engine, simulate_cluster):
        with pytest.raises(DemandError, match=r"predictor is .*expected an object with a method"):
            serve(jobs, SERPT(), predictor=lambda call: Distribution([1.0]))
        with pytest.raises(DemandError, match=r"what the predictor says of 'a' is 3.0; expected"):
            serve(jobs, SERPT(), predictor=Mistaken())
    alone = Workload([0.0], [1.0], ["a"], {"a": Distribution([1.0])})
    with pytest.raises(DemandError, match="the workload has no runs"):
        simulate(alone, SERPT(), predictor=DemandEstimator({}))
    with pytest.raises(DemandError, match="kind 'search'; expected an llm"):
        PendingCall("a", SEARCH)
    with pytest.raises(DemandError, match="in the middle of unit 'ask'"):
        PendingCall("a", ASK, progress=Progress(current="ask", attained_seconds=1.0))
    with pytest.raises(DemandError, match="input_tokens of a call are -1"):
        pending(-1)
    with pytest.raises(DemandError, match="expected one ahead"):
        PendingCall.of_run("a", told_runs(1)[0], 9)
    with pytest.raises(DemandError, match="prompts are not as many as units"):
        calibrate_calls(DemandEstimator({}), "a", told_runs(2), prompts=[["x"]])
    for x, y, said in (
        ([[1.0]], [], r"expected \[n, d\] and \[n\]"),
        ([1.0], [1.0], r"expected \[n, d\] and \[n\]"),
        ([[1.0]], [-1.0], "negative"),
        ([[np.nan]], [1.0], "not finite"),
    ):
        with pytest.raises(DemandError, match=said):
            LogRidge().fit(x, y)


WHO, WHERE, JOIN = (Unit(name, "llm") for name in ("who", "where", "join"))


def wide(rng, unit=WHERE):
    """Two thoughts side by side, the longer the longer their prompts, and what joins them."""
    tokens = rng.integers(10, 1000, 2).tolist()
    thoughts = [Execution(one, n, n, after=()) for one, n in zip((WHO, unit), tokens, strict=True)]
    return [*thoughts, Execution(JOIN, 10, 10, after=(0, 1))]


def test_a_call_is_told_as_its_stage():
    run = wide(np.random.default_rng(0))
    told = PendingCall.of_run("a", run, 0, cost=COST)
    mean = (run[0].input_tokens + run[1].input_tokens) / 2
    assert (told.unit, told.parallelism) == (Unit("where + who", "llm"), 2)
    assert (told.input_tokens, told.progress) == (mean, Progress())
    assert PendingCall.of_run("a", run, 2, cost=COST).unit == JOIN
    with pytest.raises(DemandError, match="something is over"):
        PendingCall.of_run("a", run, 1, cost=COST)
    mixed = [Execution(ASK, 10, 5, after=()), Execution(SEARCH, seconds=1.0, after=())]
    with pytest.raises(DemandError, match="expected an llm"):
        PendingCall.of_run("a", mixed, 0)


@pytest.mark.parametrize("unit", [WHO, WHERE])
def test_calls_of_a_stage_are_predicted_as_well_as_the_same_calls_in_turn(unit):
    """Of one name and of two: what is predicted of both prompts is right in the mean."""
    rng = np.random.default_rng(1)
    known, held_out = ([wide(rng, unit) for _ in range(n)] for n in (300, 200))
    estimator = DemandEstimator({"a": PDGraph.fit(known, cost=COST)}, PromptRegression(), cost=COST)
    blind = calibrate(lambda progress: estimator("a", progress), held_out, (0,), cost=COST)
    told = calibrate_calls(estimator, "a", held_out, (0,), cost=COST)
    assert told.overall.predicted == pytest.approx(told.overall.observed, rel=0.05)
    assert told.overall.crps < 0.5 * blind.overall.crps
    assert not estimator.fallbacks


def test_a_call_whose_unit_alone_is_unknown_is_predicted_from_its_progress():
    plan = Execution(ASK, 10, 10)
    stage = [Execution(one, 10, 100, after=(0,)) for one in (WHO, WHERE)]
    runs = [[plan, *stage, Execution(JOIN, 10, 10)], [plan]] * 10
    for refinement in (CurrentUnit(), PromptRegression()):
        told = DemandEstimator({"a": PDGraph.fit(runs, cost=COST)}, refinement, cost=COST)
        at_progress = told("a", Progress([plan]))
        call = PendingCall("a", Unit("new", "llm"), 10, progress=Progress([plan]))
        assert told.predict(call) == at_progress
        assert told.fallbacks == {("a", "unit"): 1}
        first = PendingCall("a", WHO, 10, progress=Progress([plan]))
        of_run = told.predict(PendingCall.of_run("a", runs[0], 1, cost=COST))
        assert told.predict(first) == of_run
        assert told.fallbacks == {("a", "unit"): 1}
        told.observe("a", [plan, stage[0], Execution(JOIN, 10, 10, after=(0,))])
        told.predict(first)  # which of its stages it is cannot be told
        assert told.fallbacks == {("a", "unit"): 2}


def test_a_predictor_says_no_less_than_the_estimator_at_a_mixed_stage():
    mixed = [Execution(ASK, 10, 50), Execution(WHO, 10, 5, after=(0,)),
             Execution(SEARCH, seconds=9.0, after=(0,))]  # fmt: skip
    asked = []

    class Noting:
        def predict(self, call):
            asked.append(call.unit.name)
            return Distribution([5.0])

    simulate(workload([mixed]), SERPT(), predictor=Noting())
    assert asked == ["ask"]
