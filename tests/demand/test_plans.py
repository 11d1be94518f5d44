"""Plans that adapters execute: what is ready when, what is left, failures, and a fake server."""

import asyncio
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import (
    FCFS,
    CostModel,
    DemandError,
    DemandEstimator,
    Distribution,
    Execution,
    LeastSlack,
    Unit,
)
from demand.integrations.plans import OpenPlan, PlanError, Planned
from demand.integrations.vllm import AdmissionController, CallError, Retry, Server
from demand.simulation.engine.waits import Waits
from tests.demand.openai_server import Answer, FakeServer, body, run_async, tokens_of
from tests.demand.plans import afters, before, longest_chain, waiting

ASK, MATH = Unit("ask", "llm"), Unit("math", "tool")
DIAMOND = [(), (0,), (0,), (0,), (1, 2), (3,), (4, 5)]
COST = CostModel(0.25, 1.0)


def nothing(*given):
    return given


@settings(max_examples=40)
@given(st.data())
def test_what_is_ready_is_what_waits_for_nothing_that_is_not_over(data):
    units = data.draw(st.integers(1, 7))
    waits = data.draw(afters(units))
    run = waiting([Execution(MATH, seconds=1.0)] * units, waits)
    plan = OpenPlan([Planned(MATH, nothing, after) for after in waits])
    values, failed, underway, begun = {}, {}, [], []
    while True:
        expected = [
            at
            for at in range(units)
            if at not in begun and all(b in values for b in before(run, at))
        ]
        ready = plan.take_ready()
        assert ready == expected
        assert plan.take_ready() == []
        for at in ready:
            assert plan.begin(at) == tuple(values[b] for b in before(run, at))
            begun.append(at)
            underway.append(at)
        if not underway:
            break
        at = data.draw(st.sampled_from(underway))
        underway.remove(at)
        if data.draw(st.integers(0, 4)):
            values[at] = f"of {at}"
            plan.end(at, values[at])
        else:
            failed[at] = ValueError(at)
            plan.fail(at, failed[at])
    if not failed:
        assert plan.outcome() == [values[at] for at in range(units)]
        return
    with pytest.raises(PlanError) as raised:
        plan.outcome()
    above = {}
    for at in range(units):
        above[at] = set(before(run, at)).union(*(above[b] for b in before(run, at)))
    lost = {at: tuple(sorted(above[at] & failed.keys())) for at in range(units) if at not in begun}
    assert (raised.value.values, raised.value.failed) == (values, failed)
    assert raised.value.never_begun == lost
    assert all(lost.values())


@settings(max_examples=40)
@given(st.data())
def test_what_is_left_is_the_sum_or_the_longest_path(data):
    """Of units of known seconds, those underway less what they have had."""
    units = data.draw(st.integers(1, 6))
    waits = data.draw(afters(units))
    seconds = [float(data.draw(st.integers(3, 9))) for _ in range(units)]
    planned = [
        Planned(MATH, nothing, after, Distribution([took]))
        for after, took in zip(waits, seconds, strict=True)
    ]
    plans = {word: OpenPlan(planned, word) for word in ("sum", "critical_path")}
    had = dict.fromkeys(range(units), 0.0)
    underway = []
    for _ in range(units):
        for plan in plans.values():
            ready = plan.take_ready()
            for at in ready:
                plan.begin(at)
        underway += ready
        for at in underway:
            had[at] = min(had[at] + data.draw(st.integers(0, 2)), seconds[at] - 1)
        left = waiting(
            [Execution(MATH, seconds=s - had[at]) for at, s in enumerate(seconds)], waits
        )
        # What is over takes no time any more.
        assert plans["sum"].remaining(had.get).mean() == sum(one.seconds for one in left)
        assert plans["critical_path"].remaining(had.get).mean() == longest_chain(left, COST)
        at = data.draw(st.sampled_from(underway))
        underway.remove(at)
        had[at] = seconds[at]
        for plan in plans.values():
            plan.end(at, None)
    assert plans["sum"].remaining(had.get) is None


def test_draws_of_several_units_are_independent():
    planned = [Planned(MATH, nothing, (), Distribution([0.0, 1.0])) for _ in range(2)]
    both = OpenPlan(planned).remaining(had := {}.get)
    assert [both.survival(0.0), both.survival(1.0)] == pytest.approx([0.75, 0.25], abs=0.05)
    longest = OpenPlan(planned, "critical_path").remaining(had)
    assert longest.survival(0.0) == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: OpenPlan([]), "no units"),
        (lambda: OpenPlan([MATH]), r"the plan\[0\].* expected.*Planned"),
        (lambda: OpenPlan([Planned(MATH, nothing, (0,))]), "waits for unit 0, which is itself"),
        (lambda: OpenPlan([Planned(MATH, nothing)], "longest"), "parallel_calls is 'longest'"),
        (
            lambda: OpenPlan(
                [Planned(MATH, nothing, seconds=Distribution([1.0])), Planned(MATH, nothing)]
            ),
            "1 of the 2 units of the plan say their seconds",
        ),
        (lambda: Planned("math", nothing), "unit of a plan"),
        (lambda: Planned(MATH, {"prompt": "a"}), "make of 'math'"),
        (lambda: Planned(MATH, nothing, "0"), "after of unit 'math'"),
        (lambda: Planned(MATH, nothing, seconds=3.0), "seconds of 'math'"),
    ],
)
def test_what_is_no_plan_is_refused(make, says):
    with pytest.raises(DemandError, match=says):
        make()


def call_of(number, *given):
    return body(f"u{number}", 2)


def calls(waits=DIAMOND, **seconds):
    return [
        Planned(Unit(f"ask {at}", "llm"), partial(call_of, at), after, **seconds)
        for at, after in enumerate(waits)
    ]


def controller_of(server, policy=None, **given):
    given = {"retry": Retry(attempts=1), "cost": COST, "in_flight": 8} | given
    if "estimator" not in given:
        given["distributions"] = {"plan": Distribution([9.0])}
    return AdmissionController(Server(server.url), policy or FCFS(), **given)


class Gated:
    """Answers a call when the test says so, and some with an error."""

    def __init__(self, refused=()):
        self.gates = {}
        self.refused = refused

    def __call__(self, request):
        prompt = request.body["prompt"]
        if prompt in self.refused:
            return Answer(status=400, error_body="no such prompt")
        gate = self.gates.setdefault(prompt, asyncio.Event())
        return Answer(tokens_of(request), gate_at=gate, after=1)

    def open(self, number):
        self.gates[f"u{number}"].set()


async def until(condition):
    async with asyncio.timeout(5.0):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("ends", [[0, 2, 1, 3, 5, 4, 6], [0, 3, 5, 1, 2, 4, 6]])
@run_async
async def test_calls_are_submitted_in_the_order_of_the_simulator(ends) -> None:
    waits = Waits(waiting([Execution(MATH, seconds=1.0)] * len(DIAMOND), DIAMOND))
    expected = waits.first()
    for at in expected:
        waits.begin(at)
    gated = Gated()
    async with FakeServer(gated) as server, controller_of(server) as controller:
        with controller.start("plan") as run:
            task = asyncio.create_task(run.execute(calls(), "completions"))
            for at in ends:
                await until(lambda: len(gated.gates) == len(expected))
                assert server.prompts == [f"u{one}" for one in expected]
                gated.open(at)
                for ready in waits.end(at):
                    waits.begin(ready)
                    expected.append(ready)
            assert await task == [f"u{at}.0 u{at}.1 " for at in range(7)]
        assert sorted(expected) == list(range(7))
        counts = controller.counts
        assert (counts.submitted, counts.finished) == (7, 7)
        assert run.job.attained_service == 7 * (10 * 0.25 + 2 * 1.0)  # each call once


@run_async
async def test_what_a_call_is_handed_is_what_those_before_it_gave() -> None:
    plan = [
        Planned(ASK, lambda: body("a", 1)),
        Planned(MATH, lambda text: asyncio.sleep(0.0, f"{text}+")),
        Planned(ASK, lambda *both: body("|".join(both), 1), (0, 1)),
    ]
    async with FakeServer() as server, controller_of(server) as controller:
        with controller.start("plan") as run:
            assert await run.execute(plan, "completions") == ["a.0 ", "a.0 +", "a.0 |a.0 +.0 "]


@run_async
async def test_a_call_that_fails_takes_with_it_what_waits_for_it_and_nothing_else() -> None:
    gated = Gated(refused=("u1",))
    async with FakeServer(gated) as server, controller_of(server) as controller:
        with controller.start("plan") as run:
            task = asyncio.create_task(run.execute(calls(), "completions"))
            for at in (0, 2, 3, 5):
                await until(lambda at=at: f"u{at}" in gated.gates)
                gated.open(at)
            with pytest.raises(PlanError) as raised:
                await task
        error = raised.value
        assert list(error.values) == [0, 2, 3, 5]
        assert list(error.failed) == [1]
        assert isinstance(error.failed[1], CallError)
        assert error.never_begun == {4: (1,), 6: (1,)}
        assert "4 of 7 units of the plan are over; unit 1 ('ask 1') failed" in str(error)
        assert sorted(server.prompts) == ["u0", "u1", "u2", "u3", "u5"]
        counts = controller.counts
        assert (counts.submitted, counts.finished, counts.failed) == (5, 4, 1)
        assert run.job.attained_service == 4 * 4.5


async def fails():
    raise OSError("no calculator")


@pytest.mark.parametrize(
    ("planned", "error", "says"),
    [
        (Planned(MATH, fails), OSError, "no calculator"),
        (Planned(MATH, lambda: 3), DemandError, "make of 'math' gives 3; expected an awaitable"),
        (Planned(ASK, lambda: 3), DemandError, "the body is 3"),
        (Planned(ASK, lambda: 1 / 0), ZeroDivisionError, "division"),
    ],
    ids=["its tool", "no tool", "no body", "its make"],
)
@run_async
async def test_a_unit_may_fail_before_or_after_it_began(planned, error, says) -> None:
    plan = [planned, Planned(ASK, lambda _: body("a")), Planned(ASK, lambda: body("b"), ())]
    async with FakeServer() as server, controller_of(server) as controller:
        with controller.start("plan") as run, pytest.raises(PlanError, match=says) as raised:
            await run.execute(plan, "completions")
        assert isinstance(raised.value.failed[0], error)
        assert raised.value.__cause__ is raised.value.failed[0]
        assert raised.value.never_begun == {1: (0,)}
        assert server.prompts == ["b"]


@run_async
async def test_who_no_longer_waits_for_a_plan_cancels_its_calls() -> None:
    gated = Gated()
    async with FakeServer(gated) as server, controller_of(server) as controller:
        run = controller.start("plan")
        task = asyncio.create_task(run.execute(calls(), "completions"))
        await until(lambda: gated.gates)
        gated.open(0)
        await until(lambda: len(gated.gates) == 4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: controller.counts.cancelled == 3)
        counts = controller.counts
        assert (counts.submitted, counts.finished, counts.in_flight) == (4, 1, 0)
        run.finish()


@run_async
async def test_a_run_keeps_its_turn_between_the_calls_of_its_plan() -> None:
    async with FakeServer() as server, controller_of(server, in_flight=1) as controller:
        with controller.start("plan") as first, controller.start("plan") as second:
            chain = calls([(), (0,), (1,)])
            task = asyncio.create_task(first.execute(chain, "completions"))
            await asyncio.sleep(0.0)
            other = await second.submit("completions", body("other"))
            await task
            await other.text()
        assert server.prompts == ["u0", "u1", "u2", "other"]


@pytest.mark.parametrize(
    ("parallel_calls", "left"), [("critical_path", [9.0, 6.0, 2.0]), ("sum", [13.0, 10.0, 2.0])]
)
@run_async
async def test_the_policy_is_told_what_is_left(parallel_calls, left) -> None:
    """As it begins, and as each unit ends, before those that then begin are ranked."""
    seen = []

    def noted(prompt, *_):
        seen.append(run.job.distribution.mean())
        return body(prompt, 1)

    plan = [
        Planned(Unit("plan", "llm"), partial(noted, "plan"), (), Distribution([3.0])),
        Planned(Unit("one", "llm"), partial(noted, "one"), (0,), Distribution([4.0])),
        Planned(Unit("two", "llm"), partial(noted, "two"), (0,), Distribution([4.0])),
        Planned(Unit("join", "llm"), partial(noted, "join"), (1, 2), Distribution([2.0])),
    ]
    async with FakeServer() as server, controller_of(server, LeastSlack()) as controller:
        with controller.start("plan", deadline_seconds=60.0) as run:
            await run.execute(plan, "completions", parallel_calls=parallel_calls)
    assert seen == [left[0], left[1], left[1], left[2]]


@run_async
async def test_units_may_wait_for_room_in_the_controller() -> None:
    async with FakeServer() as server:
        async with controller_of(server, in_flight=1, capacity=1) as controller:
            with controller.start("plan") as run:
                plan = calls([(), (0,), (0,), (0,), (1, 2, 3)], seconds=Distribution([4.5]))
                await run.execute(plan, "completions")
        assert server.prompts == ["u0", "u1", "u2", "u3", "u4"]


@run_async
async def test_an_estimator_learns_what_a_plan_executed() -> None:
    estimator = DemandEstimator({}, cost=COST)
    plan = [
        Planned(Unit("plan", "llm"), lambda: body("plan", 1)),
        Planned(Unit("math", "tool"), lambda _: asyncio.sleep(0.02), (0,)),
        Planned(Unit("search", "llm"), lambda _: body("search", 1), (0,)),
        Planned(Unit("join", "llm"), lambda *_: body("join", 1), (1, 2)),
    ]
    async with FakeServer() as server:
        async with controller_of(server, estimator=estimator) as controller:
            with controller.start("plan") as run:
                await run.execute(plan, "completions")
            with controller.start("plan") as run, pytest.raises(DemandError, match="beside an est"):
                await run.execute(calls([()], seconds=Distribution([1.0])), "completions")
        graph = estimator.graphs["plan"]
        assert graph.branches("plan") == {"math + search": 1.0}
        assert graph.branches("math + search") == {"join": 1.0}
        assert estimator("plan").mean() > 3 * 3.5  # three calls, and the tool
