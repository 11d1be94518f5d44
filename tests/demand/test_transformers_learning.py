"""The loop that learns inside transformers: what the engine did is what the graph observes."""

import pytest

from demand import (
    SERPT,
    DemandError,
    DemandEstimator,
    Distribution,
    Execution,
    Gittins,
    PDGraph,
    PendingCall,
    Progress,
    Unit,
)
from demand.integrations.transformers import JobTable
from demand.refine import CurrentUnit, PromptRegression
from tests.demand.continuous import Stepped, config, prompt
from tests.demand.serving import SECONDS, serve

PLAN, WRITE, SEARCH = Unit("plan", "llm"), Unit("write", "llm"), Unit("search", "search")


def call(unit, read, made):
    return Execution.of_calls(unit, input_tokens=[read], output_tokens=[made])


def runs():
    return [[call(PLAN, 8, 3), call(WRITE, 9, new)] for new in (4, 30)] * 3


def learner(refinement=None):
    return DemandEstimator({"agent": PDGraph.fit(runs())}, refinement or CurrentUnit(), lag=0.0)


def test_a_job_is_recorded_refined_and_learned_from(model):
    estimator = learner()
    run = Stepped(model, SERPT(), config(), learning=dict(estimator=estimator))
    job = run.table.open("agent")
    assert job.distribution == estimator("agent")
    run.add(job, "p", prompt(8), 3, "plan")
    run.finish()
    assert job.distribution == estimator("agent", Progress([call(PLAN, 8, 3)]))
    run.table.record(job, Execution(SEARCH, seconds=0.5))
    for name in ("w1", "w2"):
        run.add(job, name, prompt(9, seed=len(name)), 5, "write")
    run.finish()
    both = Execution.of_calls(WRITE, input_tokens=[9, 9], output_tokens=[5, 5])
    executed = (call(PLAN, 8, 3), Execution(SEARCH, seconds=0.5), both)
    assert job.attained_service == pytest.approx(run.table.cost.run_seconds(executed))
    assert estimator.graphs["agent"].observed == 6
    run.table.close(job)
    assert estimator.graphs["agent"].runs[-1] == executed


def test_units_that_are_ready_go_side_by_side(model):
    estimator = learner()
    run = Stepped(model, SERPT(), config(), learning=dict(estimator=estimator))
    job = run.table.open("agent")
    run.add(job, "p", prompt(8), 3, "plan")
    run.finish()
    run.add(job, "w", prompt(9), 5, "write")
    run.add(job, "a", prompt(7), 20, "plan")
    run.table.record(job, Execution(SEARCH, seconds=0.5, after=(0,)))
    with pytest.raises(DemandError, match="waits for unit 2"):
        run.table.record(job, Execution(SEARCH, seconds=0.5, after=(2,)))
    run.finish()
    run.add(job, "j", prompt(9), 2, "write")
    run.finish()
    run.table.close(job)
    executed = estimator.graphs["agent"].runs[-1]
    assert [(e.unit.name, e.after) for e in executed] == [
        ("plan", None), ("search", None), ("write", (0,)), ("plan", (0,)), ("write", (1, 2, 3))
    ]  # fmt: skip
    assert job.attained_service == pytest.approx(run.table.cost.run_seconds(executed))


def test_what_was_evicted_and_came_back_is_recorded_once(model):
    estimator = learner()
    run = Stepped(model, Gittins(), config(blocks=8), learning=dict(estimator=estimator))
    for number in range(4):
        run.submit("agent", str(number), prompt(20, number), 30)
    run.finish()
    assert run.scheduler.evictions > 0
    assert estimator.graphs["agent"].runs[-4:] == ((call(Unit("call", "llm"), 20, 30),),) * 4


def test_a_cancelled_request_is_not_learned_from(model):
    estimator = learner()
    run = Stepped(model, SERPT(), config(), learning=dict(estimator=estimator))
    run.submit("agent", "a", prompt(8), 50)
    run.submit("agent", "b", prompt(8), 5)
    run.step(3)
    run.manager.cancel_request("a")
    run.finish()
    assert len(run.table) == 0
    assert [len(each) for each in estimator.graphs["agent"].runs[6:]] == [1]


def test_a_predictor_knows_the_prompt_before_the_first_token(model):
    estimator = learner(PromptRegression())
    run = Stepped(model, SERPT(), config(), learning=dict(estimator=estimator, predictor=estimator))
    job = run.table.open("agent")
    run.add(job, "p", prompt(8), 3, "plan")
    call_ahead = PendingCall("agent", PLAN, 8)
    assert job.distribution == estimator.predict(call_ahead) != estimator("agent")
    run.table.close(job)
    run.finish()


def test_a_served_model_teaches_an_estimator(model):
    estimator = DemandEstimator({}, CurrentUnit(), lag=0.0)
    with serve(model, SERPT(), distributions=None, estimator=estimator) as batching:
        for _ in range(2):
            ids = [batching.submit(prompt(6), "chat", max_new_tokens=4) for _ in range(3)]
            for one in ids:
                batching.result(one, SECONDS)
    assert len(estimator.graphs["chat"].runs) == 6
    assert estimator("chat").values.tolist() == pytest.approx([6e-4 + 4 * 0.06])


def test_an_estimator_stands_alone():
    known = {"agent": learner()("agent")}
    with pytest.raises(DemandError, match="beside an estimator"):
        JobTable(SERPT(), known, estimator=learner())
    with pytest.raises(DemandError, match="beside an estimator"):
        JobTable(SERPT(), graphs={"agent": PDGraph.fit(runs())}, estimator=learner())
    table = JobTable(SERPT(), estimator=learner())
    job = table.open("agent")
    with pytest.raises(DemandError, match="seconds of service without a unit"):
        table.serve(job, 2.0)


def test_nobody_is_asked_about_a_request_that_came_unannounced():
    class Fails:
        def predict(self, call):
            raise RuntimeError("out of memory")

    table = JobTable(SERPT(), {"agent": Distribution([9.0])}, predictor=Fails())
    with pytest.warns(UserWarning, match="'unannounced request' was never seen"):
        table.entered("alone")
    assert (len(table), table.ranked(["alone"])) == (1, ["alone"])
    table.ended("alone", finished=True)
    assert not len(table)
    with pytest.raises(RuntimeError, match="out of memory"):
        table.announce(table.open("agent"), "one")


def test_requests_side_by_side_are_one_request_of_their_job():
    """A job waits from the first of them on, as it does in a simulator and inside vLLM."""
    clock = [0.0]
    table = JobTable(SERPT(), estimator=learner(), clock=lambda: clock[0])
    job = table.open("agent")
    for second, name in ((1.0, "first"), (2.0, "beside it")):
        clock[0] = second
        table.announce(job, name, "write")
        assert job.requested == 1.0
    for name in ("first", "beside it"):
        table.ended(name, finished=True)
    clock[0] = 3.0
    table.announce(job, "later", "write")
    assert job.requested == 3.0
