"""The loop that learns: what a run executed, what is told of its rest, and what is observed."""

import copy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demand import (
    LAS,
    SERPT,
    CostModel,
    DemandError,
    DemandEstimator,
    Distribution,
    Execution,
    Gittins,
    PDGraph,
    Progress,
    Unit,
)
from demand.graph.given_units import GivenUnit
from demand.integrations.job_ledger import JobLedger
from demand.integrations.run_record import RunRecord
from demand.refine import CurrentUnit, PromptRegression
from demand.stages import in_stages

COST = CostModel(prefill_seconds_per_token=0.5, decode_seconds_per_token=2.0)
PLAN, SEARCH, CALL = Unit("plan", "llm"), Unit("search", "search"), Unit("call", "llm")


def call(unit, read, made):
    return Execution.of_calls(unit, input_tokens=[read], output_tokens=[made])


def known_runs():
    """A short plan is followed by a search and another plan, a long one by nothing."""
    again = [call(PLAN, 4, 5), Execution(SEARCH, seconds=3.0), call(PLAN, 8, 6)]
    return [again, [call(PLAN, 4, 60)]] * 4


def estimator(runs=None, **settings):
    graph = PDGraph.fit(known_runs() if runs is None else runs, name="agent", cost=COST)
    return DemandEstimator({"agent": graph}, CurrentUnit(), cost=COST, lag=0.0, **settings)


def ledger_of(learns, policy=None):
    return JobLedger(policy or SERPT(), {}, estimator=learns)


def serve(ledger, job, call_id, read, made, now=0.0):
    ledger.loop.count(job, call_id, read, made)
    before = job.attained_service
    ledger.serve(job, read * 0.5 + made * 2.0, now)
    return job.attained_service - before


def test_one_call_after_another_is_a_run():
    record = RunRecord(COST)
    assert not record.whole
    record.begin("a", PLAN)
    assert record.busy
    record.count("a", 3, 0)
    record.count("a", 3, 7)
    assert record.progress() == Progress((), "plan", 15.5, 15.5)
    assert not record.whole
    record.end("a")
    assert not record.busy
    record.add(Execution(SEARCH, seconds=2.0))
    record.begin("b", PLAN)
    record.end("b")  # it read and made nothing that anybody knows of
    assert record.executed == [call(PLAN, 3, 7), Execution(SEARCH, seconds=2.0)]
    assert record.progress() == Progress(record.executed)
    assert record.whole


def test_calls_of_a_unit_that_overlap_are_one_execution():
    record = RunRecord(COST)
    record.begin("a", PLAN)
    record.begin("b", PLAN)
    record.count("a", 2, 10)
    record.count("b", 4, 3, "first")
    record.count("b", 4, 5, "second")
    record.end("a")
    assert record.executed == []
    assert record.progress() == Progress((), "plan", 21.0 + 8.0 + 12.0, 21.0)
    record.end("b")
    assert record.executed == [
        Execution.of_calls(PLAN, input_tokens=[2, 4, 4], output_tokens=[10, 3, 5])
    ]


def test_units_that_overlap_are_recorded_as_they_end():
    record = RunRecord(COST)
    record.begin("a", PLAN)
    record.begin("b", CALL)
    record.count("b", 1, 1)
    record.end("b")
    record.count("a", 2, 2)
    assert record.progress() == Progress((), "call + plan", 2.5 + 5.0, 5.0)
    record.end("a")
    beside = replace(call(PLAN, 2, 2), after=())
    assert record.executed == [call(CALL, 1, 1), beside]


def test_what_went_side_by_side_is_recorded_as_such():
    """A plan, a call and two tools beside it, and what joins them."""
    record = RunRecord(COST)
    serve_call(record, "plan", PLAN)
    record.begin("a", CALL)
    record.add(Execution(SEARCH, seconds=1.0, after=(0,)))
    with pytest.raises(DemandError, match="unit 2 of the run so far waits for unit 2"):
        record.check(Execution(SEARCH, seconds=2.0, after=(2,)))
    record.add(Execution(SEARCH, seconds=2.0, after=(0,)))
    record.count("a", 1, 1)
    assert record.progress().current == "call + search"
    assert record.progress().executed == (call(PLAN, 2, 2),)
    record.end("a")
    serve_call(record, "join", PLAN)
    afters = [execution.after for execution in record.executed]
    assert afters == [None, None, (0,), (0,), (1, 2, 3)]
    assert record.progress() == Progress(in_stages(record.executed, COST))
    assert [stage.unit.name for stage in in_stages(record.executed)] == [
        "plan", "call + search", "plan"
    ]  # fmt: skip


def serve_call(record, name, unit):
    record.begin(name, unit)
    record.count(name, 2, 2)
    record.end(name)


units_and_lengths = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 9), st.sampled_from("abc")), min_size=1, max_size=7
)


@given(units_and_lengths)
def test_a_record_says_what_overlapped(spans):
    """Units over spans of time: each waits for what was over as it began, however it is told."""
    record, opened, busy_until = RunRecord(COST), [], {}
    for begin, length, name in sorted(spans):  # one at a time of a name: each is its own unit
        if busy_until.get(name, -1) < begin:
            busy_until[name] = begin + length
            opened.append((begin, begin + length, name))
    moments = [(one[0], 1, one) for one in opened] + [(one[1], 0, one) for one in opened]
    for _, begins, one in sorted(moments):
        if begins:
            record.begin(one, Unit(one[2], "llm"))
            record.count(one, 1, 1)
        else:
            record.end(one)
    ended = sorted(opened, key=lambda one: (one[1], one))
    reach = []  # of each unit, all that it waited for, and what these did
    for at, execution in enumerate(record.executed):
        after = execution.after if execution.after is not None else range(at)[-1:]
        reach.append({*after}.union(*(reach[before] for before in after)))
        over = {number for number, one in enumerate(ended) if one[1] <= ended[at][0]}
        assert reach[at] == over


def test_a_call_that_did_not_finish_leaves_nothing_and_cuts_off():
    record = RunRecord(COST)
    record.begin("a", PLAN)
    record.count("a", 2, 2)
    record.end("a", finished=False)
    assert (record.executed, record.cut_off, record.whole) == ([], True, False)
    record.begin("b", PLAN)
    record.count("b", 2, 3)
    record.end("b")
    assert (record.executed, record.whole) == ([call(PLAN, 2, 3)], True)


def test_what_was_cancelled_beside_calls_that_finished_leaves_nothing_behind():
    record = RunRecord(COST)
    for number in range(10):
        record.begin(number, PLAN)
        record.count(number, 4, 5)
    for number in range(10):
        record.end(number, finished=number == 9)
    assert (record.executed, record.whole) == ([call(PLAN, 4, 5)], True)


steps = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(1, 9), st.integers(1, 9), st.booleans()),
    min_size=1,
    max_size=6,
)


@given(steps)
def test_jobs_know_what_the_estimator_says_of_their_progress(steps):
    """The twin writes down the run by hand, and asks at every end."""
    runs = [[call(Unit(u, "llm"), r, m) for u, r, m, _ in steps], [call(Unit("a", "llm"), 5, 5)]]
    learns = estimator([*runs, *known_runs()])
    twin = copy.deepcopy(learns)
    ledger = ledger_of(learns)
    job = ledger.open("agent", 0.0)
    assert job.distribution == job.prior == twin("agent")
    executed = []
    for number, (name, read, made, tool) in enumerate(steps):
        ledger.loop.begin(job, number, name)
        serve(ledger, job, number, read, made)
        ledger.loop.end(job, number, finished=True)
        executed.append(call(Unit(name, "llm"), read, made))
        told = twin("agent", Progress(executed))
        assert job.distribution == told or told.extrapolated
        if tool:
            ledger.record(job, Execution(SEARCH, seconds=1.0), 0.0)
            executed.append(Execution(SEARCH, seconds=1.0))
            assert job.distribution == twin("agent", Progress(executed))
        assert job.attained_service == pytest.approx(sum(map(COST.seconds, executed)))
        assert job.known_at == job.attained_service
    before = len(learns.graphs["agent"].runs)
    ledger.close(job, 0.0)
    assert learns.graphs["agent"].runs[before:] == (tuple(executed),)


def test_what_was_learned_holds_for_the_next_job_and_changes_ranks():
    learns = estimator()
    ledger = ledger_of(learns)
    first = ledger.open("agent", 0.0)
    ledger.loop.begin(first, 0, "plan")
    serve(ledger, first, 0, 4, 5000)
    ledger.loop.end(first, 0, finished=True)
    rank = ledger.rank(ledger.open("agent", 1.0), 1.0)
    ledger.close(first, 1.0)
    assert ledger.rank(ledger.open("agent", 1.0), 1.0) > rank


@pytest.mark.parametrize("policy", [SERPT(), Gittins(), LAS()])
def test_an_application_never_seen_is_learned_without_a_warning(policy, recwarn):
    learns = DemandEstimator({}, CurrentUnit(), cost=COST)
    ledger = ledger_of(learns, policy)
    for _ in range(3):
        job = ledger.open("new", 0.0)
        ledger.loop.begin(job, "x", "plan")
        serve(ledger, job, "x", 4, 5)
        ledger.loop.end(job, "x", finished=True)
        ledger.close(job, 0.0)
    assert not [w for w in recwarn if "never seen" in str(w.message)]
    assert learns.graphs["new"].runs == ((call(PLAN, 4, 5),),) * 3
    assert ledger.open("new", 0.0).prior == Distribution([12.0])


def test_runs_that_were_cut_off_are_not_learned_from():
    learns = estimator()
    ledger = ledger_of(learns)
    before = learns.graphs["agent"].observed

    def job_with(finished, ended=True):
        job = ledger.open("agent", 0.0)
        ledger.loop.begin(job, 0, "plan")
        serve(ledger, job, 0, 1, 1)
        if ended:
            ledger.loop.end(job, 0, finished)
        return job

    ledger.close(job_with(True), 0.0, whole=False)  # by an error, say
    ledger.close(job_with(False), 0.0)
    ledger.close(job_with(True, ended=False), 0.0)
    ledger.close(ledger.open("agent", 0.0), 0.0)  # it executed nothing
    assert learns.graphs["agent"].observed == before
    ledger.close(job_with(True), 0.0)
    assert learns.graphs["agent"].observed == before + 1


def test_a_call_may_end_after_its_run_was_closed():
    ledger = ledger_of(estimator())
    job = ledger.open("agent", 0.0)
    ledger.loop.begin(job, 0, "plan")
    ledger.close(job, 0.0)
    ledger.loop.count(job, 0, 1, 1)
    ledger.loop.end(job, 0, finished=False)
    assert job.distribution == job.prior


def test_a_predictor_is_asked_as_a_call_is_submitted():
    class Noting:
        asked: list

        def predict(self, call):
            self.asked.append(call)
            return Distribution([7.0])

    predictor = Noting()
    predictor.asked = []
    ledger = JobLedger(SERPT(), {"agent": Distribution([99.0])}, predictor=predictor, cost=COST)
    job = ledger.open("agent", 0.0)
    assert ledger.rank(job, 0.0) == 99.0
    ledger.loop.begin(job, 0, "plan", 5, "Plan a trip.")
    assert ledger.rank(job, 0.0) == 7.0
    ledger.loop.begin(job, 1, "plan", 9)  # beside the other: it was asked about this unit
    serve(ledger, job, 0, 5, 1)
    ledger.loop.end(job, 0, finished=True)
    ledger.loop.end(job, 1, finished=False)
    ledger.loop.begin(job, 2, "call")
    first, second = predictor.asked
    assert (first.unit, first.input_tokens, first.prompt) == (PLAN, 5.0, "Plan a trip.")
    assert (second.unit, second.input_tokens) == (CALL, None)
    assert second.progress == Progress([call(PLAN, 5, 1)])
    ledger.loop.end(job, 2, finished=True)
    predictor.predict = lambda call: None
    with pytest.raises(DemandError, match="what the predictor says of 'agent' is None"):
        ledger.loop.begin(job, 3, "call")


class FailsOnce:
    """A predictor whose first answer is an error."""

    def __init__(self):
        self.asked = []

    def predict(self, call):
        self.asked.append(call)
        if len(self.asked) == 1:
            raise ValueError("the model is not loaded yet")
        return Distribution([7.0])


def test_a_call_about_which_the_predictor_fails_leaves_nothing_behind():
    learns, predictor = estimator(), FailsOnce()
    ledger = JobLedger(SERPT(), {}, estimator=learns, predictor=predictor)
    job = ledger.open("agent", 0.0)
    with pytest.raises(ValueError, match="not loaded yet"):
        ledger.loop.begin(job, 0, "plan", 4)
    for number in (1, 2):  # the first is the same call, made again
        ledger.loop.begin(job, number, "plan", 4)
        assert job.distribution == Distribution([7.0])
        serve(ledger, job, number, 4, 5)
        ledger.loop.end(job, number, finished=True)
    ledger.close(job, 0.0)
    assert [len(call.progress.executed) for call in predictor.asked] == [0, 0, 1]
    assert learns.graphs["agent"].runs[-1] == (call(PLAN, 4, 5),) * 2


def test_nothing_is_kept_of_runs_without_anybody_to_tell():
    ledger = JobLedger(SERPT(), {"agent": Distribution([9.0])})
    job = ledger.open("agent", 0.0)
    ledger.loop.begin(job, 0, "plan")
    ledger.loop.count(job, 0, 1, 1)
    ledger.loop.end(job, 0, finished=True)
    ledger.record(job, Execution(SEARCH, seconds=2.0), 0.0)
    assert (job.attained_service, job.distribution) == (2.0, Distribution([9.0]))
    ledger.close(job, 0.0)
    assert not ledger.loop.active


def test_what_cannot_be_learned_from_is_refused():
    learns = estimator()
    ledger = ledger_of(learns)
    job = ledger.open("agent", 0.0)
    with pytest.raises(DemandError, match="'search' is of kind 'llm' here and of kind 'search'"):
        ledger.loop.begin(job, 0, "search")
    new = ledger.open("new", 0.0)
    ledger.record(new, Execution(Unit("look", "tool"), seconds=1.0), 0.0)
    with pytest.raises(DemandError, match="'look' is of kind 'llm' here"):
        ledger.loop.begin(ledger.open("new", 0.0), 0, "look")
    with pytest.raises(DemandError, match="seconds of service without a unit"):
        ledger.serve_elsewhere(job, 2.0, 0.0)
    with pytest.raises(DemandError, match="beside an estimator"):
        JobLedger(SERPT(), {"agent": Distribution([1.0])}, estimator=learns)
    with pytest.raises(DemandError, match="counts parallel calls by their critical_path"):
        ledger_of(DemandEstimator({}, parallel_calls="critical_path"))
    with pytest.raises(DemandError, match="its graph of 'agent' costs by"):
        ledger_of(DemandEstimator(learns.graphs))
    published = PDGraph.from_units(
        [GivenUnit(PLAN, [call(PLAN, 4, 5)], {"end": 1.0})], {"plan": 1.0}, cost=COST
    )
    with pytest.raises(DemandError, match=r"graph of 'agent' was given .*draw_runs of it"):
        ledger_of(DemandEstimator({"agent": published}, cost=COST))
    drawn = PDGraph.fit(published.draw_runs(3), cost=published.cost)
    assert (drawn.learns, published.learns) == (True, False)
    assert ledger_of(DemandEstimator({"agent": drawn}, cost=COST)).loop.learns
    with pytest.raises(DemandError, match=r"estimator is .*; expected a DemandEstimator"):
        JobLedger(SERPT(), {}, estimator=CurrentUnit())  # type: ignore[arg-type]
    with pytest.raises(DemandError, match=r"predictor is .*; expected an object with a method"):
        JobLedger(SERPT(), {}, predictor=print)  # type: ignore[arg-type]


tool_or_call = st.sampled_from([Unit(name, kind) for name in "ab" for kind in ("llm", "tool")])
happenings = st.lists(
    st.tuples(st.integers(0, 2), st.none() | st.booleans() | tool_or_call), max_size=30
)


@given(happenings)
def test_a_name_is_barred_by_open_runs_and_by_what_was_learned_alone(happenings):
    """The twin looks through all runs that are open and all that were observed."""
    learns = DemandEstimator({}, cost=COST)
    ledger = ledger_of(learns)
    jobs, held, learned = {}, {}, set()
    for run, what in happenings:
        if run not in jobs:
            jobs[run], held[run] = ledger.open("new", 0.0), set()
        if isinstance(what, Unit):
            others = set().union(*held.values(), learned)
            barred = any(u.name == what.name and u.kind != what.kind for u in others)
            try:
                if what.kind == "llm":
                    ledger.loop.begin(jobs[run], "x", what.name)
                    serve(ledger, jobs[run], "x", 1, 1)
                    ledger.loop.end(jobs[run], "x", finished=True)
                else:
                    ledger.record(jobs[run], Execution(what, seconds=1.0), 0.0)
            except DemandError:
                assert barred
            else:
                assert not barred
                held[run].add(what)
        else:
            ledger.close(jobs.pop(run), 0.0, whole=bool(what))
            its_units = held.pop(run)
            learned |= its_units if what else set()
            assert {u for r in learns.graphs.values() for u in r.units} == learned


# Saved and loaded.


def test_an_estimator_comes_back_as_it_was_saved(tmp_path):
    learns = DemandEstimator(estimator().graphs, CurrentUnit(), cost=COST, lag=0.25)
    learns.observe("new", [call(PLAN, 1, 2)])
    learns.save(tmp_path / "learned.json")
    again = DemandEstimator.load(tmp_path / "learned.json", CurrentUnit())
    assert (again.cost, again.lag, again.parallel_calls) == (COST, 0.25, "sum")
    assert list(again.graphs) == ["agent", "new"]
    for name in again.graphs:
        assert again(name) == learns(name)
        assert again.graphs[name].runs == learns.graphs[name].runs
    again.observe("new", [call(PLAN, 1, 3)])
    assert "2 runs" in repr(again)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "is not JSON"),
        ('{"format": "demand.PDGraph"}', "is not a demand.DemandEstimator file"),
        ('{"format": "demand.DemandEstimator", "version": 9}', "has format version 9"),
        ('{"format": "demand.DemandEstimator", "version": 1}', "is damaged: KeyError"),
        (
            '{"format": "demand.DemandEstimator", "version": 1, "graphs": {"a": 3}, "cost": {}}',
            "is damaged: .*not a demand.PDGraph",
        ),
        (
            '{"format": "demand.DemandEstimator", "version": 1, "graphs": [], "cost": {}}',
            "is damaged: AttributeError",
        ),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, said):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(DemandError, match=said):
        DemandEstimator.load(path)


def test_checking_an_execution_costs_the_same_however_long_the_run(monkeypatch):
    """What says nothing of others is compared with none of those that are over."""
    record = RunRecord(COST)
    for _ in range(50):
        record.add(Execution(SEARCH, seconds=1.0))

    class Unread(list):
        def __iter__(self):
            raise AssertionError("all units that are over were looked at")

    record.executed = Unread(record.executed)
    record.check(Execution(SEARCH, seconds=1.0))


def test_a_name_like_that_of_a_stage_is_refused_before_it_goes_beside_others():
    ledger = ledger_of(estimator())
    job = ledger.open("agent", 0.0)
    ledger.loop.begin(job, 1, "plan + search")
    with pytest.raises(DemandError, match="goes beside others"):
        ledger.loop.begin(job, 2, "plan")
    with pytest.raises(DemandError, match="goes beside others"):
        ledger.loop.check(job, Execution(SEARCH, seconds=1.0))
    ledger.loop.count(job, 1, 4, 4)
    ledger.loop.end(job, 1, True)
    ledger.loop.begin(job, 2, "plan")
    ledger.loop.end(job, 2, True)
    ledger.loop.check(job, Execution(SEARCH, seconds=1.0))
    with pytest.raises(DemandError, match="goes beside others"):
        ledger.loop.check(job, Execution(SEARCH, seconds=1.0, after=()))


def test_the_first_call_of_a_stage_is_predicted_as_one_of_it():
    """A plan is followed by two thoughts and a join, or by nothing much: which, the call tells."""
    who, where, join, short = (Unit(name, "llm") for name in ("who", "where", "join", "short"))
    plan = call(PLAN, 10, 5)
    thoughts = [replace(call(unit, 10, 20), after=(0,)) for unit in (who, where)]
    wide = [plan, *thoughts, replace(call(join, 10, 10), after=(1, 2))]
    runs = [wide, [plan, call(short, 10, 1)]] * 30
    told = DemandEstimator({"agent": PDGraph.fit(runs, cost=COST)}, PromptRegression(), cost=COST)
    ledger = JobLedger(SERPT(), {}, estimator=told, predictor=told)
    job = ledger.open("agent", 0.0)
    ledger.loop.begin(job, 0, "plan", 10)
    ledger.loop.count(job, 0, 10, 5)
    ledger.loop.end(job, 0, True)
    left = COST.run_seconds(wide[1:])
    assert not left * 0.9 < job.distribution.mean() < left * 1.1
    ledger.loop.begin(job, 1, "who", 10)
    assert job.distribution.mean() == pytest.approx(left, rel=0.1)
    assert not told.fallbacks
