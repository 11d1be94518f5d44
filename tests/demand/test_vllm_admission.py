"""The admission controller against a real HTTP server on this machine: order, service, the end."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from demand import (
    FCFS,
    SERPT,
    ClassMean,
    CostModel,
    DemandError,
    DemandEstimator,
    Distribution,
    Execution,
    Gittins,
    Job,
    Oracle,
    PDGraph,
    PendingCall,
    Policy,
    Progress,
    RandomOrder,
    Unit,
    Workload,
    simulate,
)
from demand.integrations.vllm import (
    AdmissionController,
    CallError,
    Counts,
    Retry,
    Run,
    Server,
    millisecond_priority,
)
from demand.integrations.vllm.chunks import prompt_of
from tests.demand.openai_server import Answer, FakeServer, body, run_async, tokens_of

COST = CostModel(prefill_seconds_per_token=0.01, decode_seconds_per_token=1.0)
WRITE = Unit("write", "llm")
KNOWN = {
    "short": Distribution([2.0, 3.0]),
    "long": Distribution([30.0, 50.0]),
    "bimodal": Distribution([1.0, 100.0], [0.9, 0.1]),
    "middle": Distribution([5.0, 9.0]),
}


def controller_of(
    server: FakeServer, policy: Policy | None = None, in_flight: int = 1, **options: Any
) -> AdmissionController:
    return AdmissionController(
        Server(server.url, silence_seconds=5.0),
        FCFS() if policy is None else policy,
        options.pop("distributions", KNOWN),
        in_flight=in_flight,
        cost=COST,
        retry=options.pop("retry", Retry(first_seconds=0.001, longest_seconds=0.5)),
        **options,
    )


@pytest.mark.parametrize(
    "policy",
    [FCFS(), ClassMean(), SERPT(), Gittins(), RandomOrder(), Oracle()],
    ids=lambda p: type(p).__name__,
)
def test_calls_reach_the_server_in_the_order_of_the_policy(policy: Policy) -> None:
    names = ["long", "short", "middle", "bimodal"] * 3
    gate = asyncio.Event()

    async def order() -> tuple[list[str], list[Job]]:
        async with FakeServer(lambda r: Answer(tokens_of(r), gate_at=gate)) as server:
            async with controller_of(server, policy) as controller:
                first = await controller.start("short", demand_seconds=1.0).submit(
                    "completions", body("first")
                )
                await asyncio.sleep(0.01)  # it is on its way; the others queue behind it
                runs = [
                    controller.start(name, demand_seconds=100.0 - 7.0 * i)
                    for i, name in enumerate(names)
                ]
                for i, run in enumerate(runs):
                    await run.submit("completions", body(str(i)))
                gate.set()
                await first.text()
            return server.prompts[1:], [run.job for run in runs]

    prompts, jobs = asyncio.run(order())
    for job in jobs:
        job.attained_service = 0.0
    best_first = sorted(jobs, key=lambda job: (policy.rank(job, 0.0), job.index))
    assert prompts == [str(jobs.index(job)) for job in best_first]


@dataclass
class Prediction:
    measured: float
    simulated: float


async def serve_applications(policy: Policy) -> Prediction:
    """25 applications that are all there at second 0; a call is one token, a second of service."""
    rng = np.random.default_rng(0)
    names = ["answer" if i % 2 else "report" for i in range(25)]
    calls = [8 if n == "report" else 2 if rng.random() < 0.8 else 40 for n in names]
    known = {
        "report": Distribution([8.0]),
        "answer": Distribution([2.0, 40.0], [0.8, 0.2]),
    }
    async with FakeServer() as server:

        async def application(run: Run, number: int) -> float:
            with run:
                for _ in range(number):
                    await (await run.submit("completions", body(run.job.application, 1))).text()
            return float(server.tokens_sent)

        async with AdmissionController(
            Server(server.url),
            policy,
            known,
            in_flight=1,
            cost=CostModel(0.0, 1.0),
            clock=lambda: float(server.tokens_sent),
        ) as controller:
            runs = [controller.start(name) for name in names]
            pairs = zip(runs, calls, strict=True)
            ends = await asyncio.gather(*(application(run, n) for run, n in pairs))
    workload = Workload(np.zeros(25), np.array(calls, dtype=float), names, known)
    return Prediction(float(np.mean(ends)), simulate(workload, policy).mean)


def test_gittins_beats_fcfs_by_what_the_simulator_predicts() -> None:
    fcfs = asyncio.run(serve_applications(FCFS()))
    gittins = asyncio.run(serve_applications(Gittins()))
    assert gittins.measured < 0.8 * fcfs.measured
    for run in (fcfs, gittins):
        # Exactly: calls end where the simulated jobs would be preempted, and the turn is kept.
        assert run.measured == pytest.approx(run.simulated)


@run_async
async def test_at_most_w_calls_are_in_flight() -> None:
    async with (
        FakeServer(lambda r: Answer(tokens_of(r), token_seconds=0.001)) as server,
        controller_of(server, in_flight=3) as controller,
    ):
        run = controller.start("short")
        calls = [await run.submit("completions", body(str(i))) for i in range(20)]
        assert controller.counts == Counts(20, 20, 0, 0, 0, 0)
        texts = [await call.text() for call in calls]
    assert texts == [f"{i}.0 {i}.1 {i}.2 " for i in range(20)]
    assert server.most_active == 3
    assert controller.counts == Counts(20, 0, 0, 20, 0, 0)


@run_async
async def test_a_run_accumulates_service_while_its_tokens_arrive() -> None:
    second = asyncio.Event()
    answers = iter(
        [
            Answer(("a", "b"), after=1, gate_at=second),
            Answer(("c", "d", "e"), usage=False),
        ]
    )
    async with (
        FakeServer(lambda r: next(answers)) as server,
        controller_of(server, SERPT()) as controller,
    ):
        run = controller.start("long", deadline_seconds=9.0, tenant="t", weight=2.0, priority=3)
        job = run.job
        assert (job.tenant, job.weight, job.priority) == ("t", 2.0, 3)
        assert job.deadline == job.arrival + 9.0
        call = await run.submit("completions", body("x"))
        texts = []
        async for chunk in call:
            if not texts:  # the second token is held back
                assert (job.running, job.attained_service) == (True, 1.0)
                second.set()
            texts += [choice["text"] for choice in chunk["choices"]]
        assert texts == ["a", "b"]
        assert job.attained_service == pytest.approx(2 * 1.0 + 10 * 0.01)
        assert not job.running
        run.serve(5.0)
        await (await run.submit("completions", body("y"))).text()  # without usage
        assert job.attained_service == pytest.approx(2.1 + 5.0 + 3.0)
        run.expect(Distribution([4.0]))
        assert (job.age, SERPT().rank(job, 0.0)) == (0.0, 4.0)
        run.finish()
        with pytest.raises(DemandError, match="run is finished"):
            await run.submit("completions", body("z"))


@run_async
async def test_the_rank_is_sent_as_an_integer_priority_only_if_asked_for() -> None:
    async with FakeServer() as server:
        async with controller_of(server, SERPT(), priority=millisecond_priority) as controller:
            await (await controller.start("short").submit("completions", body("a"))).text()
        async with controller_of(server, SERPT()) as controller:
            await (await controller.start("short").submit("completions", body("b"))).text()
    assert server.received[0].body == {
        **body("a"),
        "priority": 2500,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert "priority" not in server.received[1].body


@run_async
async def test_priorities_by_time_count_from_the_start_of_the_controller() -> None:
    async with (
        FakeServer() as server,
        controller_of(server, FCFS(), priority=millisecond_priority) as controller,
    ):
        first = await controller.start("short").submit("completions", body("a"))
        await asyncio.sleep(0.01)
        second = await controller.start("short").submit("completions", body("b"))
        await asyncio.gather(first.text(), second.text())
        early, late = (request.body["priority"] for request in server.received)
        assert 0 <= early < late < 20_000  # however long the machine has been up


@run_async
async def test_chat_completions() -> None:
    async with FakeServer() as server, controller_of(server) as controller:
        call = await controller.start("short").submit("chat/completions", body("hi"))
        assert await call.text() == "hi.0 hi.1 hi.2 "
        assert server.received[0].path == "/v1/chat/completions"


@run_async
async def test_submitting_waits_for_room() -> None:
    gate = asyncio.Event()
    async with (
        FakeServer(lambda r: Answer(tokens_of(r), gate_at=gate)) as server,
        controller_of(server, capacity=2) as controller,
    ):
        run = controller.start("short")
        for i in range(2):
            await run.submit("completions", body(str(i)))
        third = asyncio.create_task(run.submit("completions", body("2")))
        await asyncio.sleep(0.02)
        assert not third.done()
        assert controller.counts.submitted == 2
        gate.set()
        assert await (await third).text() == "2.0 2.1 2.2 "


@run_async
async def test_cancelling_a_call_frees_its_place_and_reaches_the_server() -> None:
    answers = {"hangs": Answer(fault="hang"), "runs": Answer(("ok",))}
    async with FakeServer(lambda r: answers[r.body["prompt"]]) as server:
        async with controller_of(server) as controller:
            run = controller.start("short")
            hangs = await run.submit("completions", body("hangs"))
            waits = await run.submit("completions", body("never sent"))
            runs = await run.submit("completions", body("runs"))
            waits.cancel()
            while not server.received:
                await asyncio.sleep(0.001)
            reader = asyncio.create_task(hangs.text())
            await asyncio.sleep(0)
            reader.cancel()  # a reader who is cancelled cancels the call
            assert await runs.text() == "ok"
            with pytest.raises(CallError, match="cancelled after 1 attempts"):
                await hangs.text()
            with pytest.raises(CallError, match="cancelled after 0 attempts"):
                await waits.chunks()
            runs.cancel()  # over already: no effect
        while not server.disconnected:
            await asyncio.sleep(0.001)
    assert server.prompts == ["hangs", "runs"]
    assert controller.counts == Counts(3, 0, 0, 1, 0, 2)


@run_async
async def test_leaving_waits_for_all_calls_and_an_error_cancels_them() -> None:
    async with FakeServer(lambda r: Answer(tokens_of(r), token_seconds=0.002)) as server:
        async with controller_of(server) as controller:
            for i in range(5):
                await controller.start("short").submit("completions", body(str(i)))
        assert controller.counts == Counts(5, 0, 0, 5, 0, 0)
        broken = controller_of(server)

        async def fail() -> None:
            async with broken:
                for i in range(5):
                    await broken.start("short").submit("completions", body(str(i)))
                await asyncio.sleep(0.001)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        assert broken.counts == Counts(5, 0, 0, 0, 0, 5)
        with pytest.raises(DemandError, match="controller is closed"):
            await broken.start("short").submit("completions", body("late"))


@run_async
async def test_a_submission_that_waits_for_room_learns_of_the_close() -> None:
    async with (
        FakeServer(lambda r: Answer(fault="hang")) as server,
        controller_of(server, capacity=1) as controller,
    ):
        run = controller.start("short")
        await run.submit("completions", body("a"))
        late = asyncio.create_task(run.submit("completions", body("b")))
        await asyncio.sleep(0.01)
        await controller.close()
        with pytest.raises(DemandError, match="controller is closed"):
            await late


@run_async
async def test_a_controller_is_entered_once() -> None:
    async with FakeServer() as server:
        controller = controller_of(server)
        async with controller:
            with pytest.raises(DemandError, match="make another AdmissionController"):
                await controller.__aenter__()
            call = await controller.start("short").submit("completions", body("a"))
            assert await call.text() == "a.0 a.1 a.2 "
        with pytest.raises(DemandError, match="make another AdmissionController"):
            await controller.__aenter__()


@run_async
async def test_finishing_a_run_cancels_its_calls() -> None:
    async with (
        FakeServer(lambda r: Answer(fault="hang")) as server,
        controller_of(server) as controller,
    ):
        with controller.start("short") as run:
            call = await run.submit("completions", body("a"))
        with pytest.raises(CallError, match="cancelled"):
            await call.text()


def test_an_application_never_seen_is_ranked_by_attained_service_and_named_once() -> None:
    async def ranks() -> list[float]:
        async with FakeServer() as server, controller_of(server, Gittins()) as controller:
            controller.start("novel")
            job = controller.start("novel").job
            found = []
            for attained in (0.5, 3.0, 50.0):
                job.attained_service = attained
                found.append(Gittins().rank(job, 0.0))
            return found

    with pytest.warns(UserWarning, match="'novel' was never seen before") as warned:
        found = asyncio.run(ranks())
    assert all(a / 2 < rank <= a for a, rank in zip((0.5, 3.0, 50.0), found, strict=True))
    assert len(warned) == 1


def test_what_cannot_be_ranked_or_sent_is_refused() -> None:
    async def refusals() -> None:
        async with FakeServer() as server, controller_of(server, Oracle()) as controller:
            with pytest.raises(DemandError, match="demand"):
                controller.start("short")
            with pytest.raises(DemandError, match="deadline_seconds of a job is -1"):
                controller.start("short", deadline_seconds=-1.0)
            run = controller.start("short", demand_seconds=1.0)
            with pytest.raises(DemandError, match="path is 'responses'"):
                await run.submit("responses", body("a"))
            with pytest.raises(DemandError, match="the body is None; expected a mapping"):
                await run.submit("completions", None)  # type: ignore[arg-type]
            with pytest.raises(DemandError, match="restart is 'again'"):
                await run.submit("completions", body("a"), restart="again")  # type: ignore[arg-type]
            with pytest.raises(DemandError, match="'stream'"):
                await run.submit("completions", {**body("a"), "stream": False})
            with pytest.raises(DemandError, match="JSON"):
                await run.submit("completions", {**body("a"), "temperature": float("nan")})
            with pytest.raises(DemandError, match=r"JSON: .*surrogates"):
                await run.submit("completions", body("\ud800"))
            with pytest.raises(DemandError, match="service holds text"):
                run.serve("1")  # type: ignore[arg-type]
            with pytest.raises(DemandError, match="remaining is None; expected a distribution"):
                run.expect(None)  # type: ignore[arg-type]
            with pytest.raises(DemandError, match=r"service is -1\.0; expected finite seconds"):
                run.serve(-1.0)
            assert controller.counts.submitted == 0

    asyncio.run(refusals())
    with pytest.raises(DemandError, match="1 <= in_flight <= capacity"):
        AdmissionController(Server("http://127.0.0.1"), FCFS(), {}, in_flight=2, capacity=1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"server": "http://127.0.0.1"}, r"server is 'http.*; expected a server, Server\("),
        ({"server": Server}, "server is the class Server; expected a server"),
        ({"policy": Gittins}, "policy is the class Gittins; expected a policy"),
        ({"distributions": Distribution([1.0])}, "distributions is .*; expected a mapping"),
        ({"distributions": {"a": 3.0}}, r"distribution of 'a' is 3\.0; expected a distribution"),
        ({"distributions": {1: Distribution([3.0])}}, "application in distributions is 1; expec"),
        ({"in_flight": "2"}, "in_flight is '2'; expected a whole number"),
        ({"in_flight": 0}, "in_flight is 0 .* 1 <= in_flight"),
        ({"capacity": 1.5}, r"capacity is 1\.5; expected a whole number"),
        ({"retry": 3}, r"retry is 3; expected Retry\(attempts=5\)"),
        ({"cost": CostModel}, "cost is the class CostModel; expected a CostModel"),
        ({"priority": 3}, "priority is 3; expected a function such as millisecond_priority"),
        ({"clock": 0.0}, r"clock is 0\.0; expected a function that gives seconds"),
        ({"seed": None}, "seed is None; expected a whole number"),
    ],
)
def test_wrong_objects_are_refused_by_what_was_expected(given: dict[str, Any], said: str) -> None:
    good = dict(server=Server("http://127.0.0.1"), policy=FCFS(), distributions=KNOWN, in_flight=1)
    with pytest.raises(DemandError, match=said):
        AdmissionController(**(good | given))


@run_async
async def test_whole_numbers_of_any_kind_are_taken() -> None:
    async with FakeServer() as server:
        numbers = dict(in_flight=np.int64(1), capacity=1e4, seed=np.uint8(3))
        retry = Retry(attempts=np.int64(2))
        async with controller_of(server, retry=retry, **numbers) as controller:  # type: ignore[arg-type]
            assert await (await controller.start("short").submit("completions", body("a"))).text()
    assert (retry.attempts, type(retry.attempts)) == (2, int)


@run_async
async def test_a_rank_that_is_no_number_is_reported_by_the_policys_name() -> None:
    @dataclass(frozen=True)
    class Speechless(Policy):
        def rank(self, job: Job, now: float) -> Any:
            return 0.0 if job.attained_service == 0.0 else None

    async with FakeServer() as server, controller_of(server, Speechless()) as controller:
        run = controller.start("short")
        await (await run.submit("completions", body("a"))).text()
        call = await run.submit("completions", body("b"))
        with pytest.raises(CallError, match=r"Speechless\(\) ranked job 0 None; expected a number"):
            await call.text()
    assert controller.counts == Counts(2, 0, 0, 1, 1, 0)


@run_async
async def test_calls_that_a_policy_fails_to_rank_are_reported() -> None:
    @dataclass(frozen=True)
    class Breaks(Policy):
        def rank(self, job: Job, now: float) -> float:
            return 1.0 / (now - 1.0)

    seconds = 0.0
    async with FakeServer() as server:
        options = {"clock": lambda: seconds}
        async with controller_of(server, Breaks(), **options) as controller:
            run = controller.start("short")
            call = await run.submit("completions", body("a"))
            seconds = 1.0
            with pytest.raises(CallError, match="could not be ranked"):
                await call.text()
    assert controller.counts == Counts(1, 0, 0, 0, 1, 0)


@run_async
async def test_a_run_that_cannot_be_ranked_costs_no_other_run_its_calls() -> None:
    @dataclass(frozen=True)
    class Picky(Policy):
        def rank(self, job: Job, now: float) -> Any:
            return None if job.attained_service and job.priority else float(job.index)

    async with FakeServer() as server, controller_of(server, Picky()) as controller:
        bad, good = controller.start("short", priority=1), controller.start("short")
        await (await bad.submit("completions", body("a"))).text()
        calls = [await run.submit("completions", body("b")) for run in (bad, good, good)]
        with pytest.raises(CallError, match="could not be ranked"):
            await calls[0].text()
        for call in calls[1:]:
            assert await call.text() == "b.0 b.1 b.2 "
    assert controller.counts == Counts(4, 0, 0, 3, 1, 0)


@run_async
async def test_a_priority_that_cannot_be_computed_costs_its_own_call_alone() -> None:
    def priority(rank: Any) -> int:
        return 1 // int(rank)  # the first run to arrive has the rank 0

    @dataclass(frozen=True)
    class InOrder(Policy):
        def rank(self, job: Job, now: float) -> float:
            return float(job.index)

    async with (
        FakeServer() as server,
        controller_of(server, InOrder(), priority=priority) as controller,
    ):
        calls = [
            await controller.start("short").submit("completions", body(prompt)) for prompt in "abc"
        ]
        with pytest.raises(CallError, match=r"could not be ranked: .*division"):
            await calls[0].text()
    assert controller.counts == Counts(3, 0, 0, 2, 1, 0)


def learner(**settings: Any) -> DemandEstimator:
    runs = [[Execution.of_calls(WRITE, input_tokens=[1], output_tokens=[n])] for n in (2, 20)]
    return DemandEstimator({"agent": PDGraph.fit(runs, cost=COST)}, cost=COST, lag=0.0, **settings)


@run_async
async def test_runs_are_recorded_refined_and_learned_from() -> None:
    estimator = learner()
    graph = estimator.graphs["agent"]
    search = Execution(Unit("search", "search"), seconds=3.0)
    async with (
        FakeServer() as server,
        AdmissionController(
            Server(server.url), SERPT(), in_flight=2, estimator=estimator
        ) as controller,
    ):
        with controller.start("agent") as run:
            assert run.job.distribution == estimator("agent")
            await (await run.submit("completions", body("a", 4), unit="write")).text()
            record = Execution.of_calls(WRITE, input_tokens=[10], output_tokens=[4])
            assert run.job.distribution == estimator("agent", Progress([record]))
            run.record(search)
            first, second = [
                await run.submit("completions", body(name, 5), unit="write") for name in "bc"
            ]
            await first.text()
            await second.text()
            assert run.job.attained_service == pytest.approx(
                sum(map(COST.seconds, [record, search])) + 10 * 1.0 + 20 * 0.01
            )
            assert len(graph.runs) == 2
        write, found, both = graph.runs[-1]
        assert (write, found) == (record, search)
        assert (both.parallelism, both.output_tokens, both.input_tokens) == (2, 5.0, 10.0)
        with pytest.raises(DemandError, match="the run is finished; record"):
            run.record(search)


@run_async
async def test_what_is_ready_is_submitted_side_by_side_and_learned_from_as_such() -> None:
    estimator = learner()
    async with (
        FakeServer() as server,
        controller_of(server, distributions=None, estimator=estimator) as controller,
    ):
        with controller.start("agent") as run:
            await (await run.submit("completions", body("p", 4), unit="plan")).text()
            names = ["search", "search", "check"]
            ready = [await run.submit("completions", body(n, 5), unit=n) for n in names]
            for call in ready:
                await call.text()
            await (await run.submit("completions", body("j", 3), unit="join")).text()
    graph = estimator.graphs["agent"]
    learned = {execution.unit.name: execution for execution in graph.runs[-1]}
    assert {*list(learned)[1:3]} == {"search", "check"}
    assert learned["search"].parallelism == 2
    assert [execution.after for execution in graph.runs[-1]] == [None, None, (0,), (1, 2)]
    assert run.job.attained_service == pytest.approx(COST.run_seconds(graph.runs[-1]))
    assert graph.branches("plan") == {"check + search": 1.0}


@run_async
async def test_runs_that_break_off_are_not_learned_from(caplog: pytest.LogCaptureFixture) -> None:
    estimator = learner()
    answers = iter([Answer(("x", "y")), Answer(status=400), Answer(("x",), fault="hang", after=1)])
    async with (
        FakeServer(lambda request: next(answers)) as server,
        AdmissionController(
            Server(server.url), FCFS(), in_flight=2, estimator=estimator
        ) as controller,
    ):
        with suppress(ZeroDivisionError), controller.start("agent") as run:
            await (await run.submit("completions", body("a"))).text()
            1 / 0  # noqa: B018
        with controller.start("agent") as run, pytest.raises(CallError):
            await (await run.submit("completions", body("a"))).text()
        with controller.start("agent") as run:
            await anext(await run.submit("completions", body("a")))
        await controller.drain()
    assert estimator.graphs["agent"].observed == 2
    assert not [record for record in caplog.records if record.name == "asyncio"]


@run_async
async def test_an_attempt_that_failed_is_not_in_the_record() -> None:
    estimator = learner()
    answers = iter([Answer(("a", "b", "c"), fault="cut", after=2), Answer(("a", "b", "c", "d"))])
    async with (
        FakeServer(lambda request: next(answers)) as server,
        controller_of(server, distributions=None, estimator=estimator) as controller,
    ):
        with controller.start("agent") as run:
            await (await run.submit("completions", body("a"), unit="write")).text()
    assert estimator.graphs["agent"].runs[-1][0].output_tokens == 4.0


@run_async
async def test_a_predictor_is_told_the_text_of_the_prompt() -> None:
    class Letters:
        def predict(self, call: PendingCall) -> Distribution:
            assert isinstance(call.prompt, str)
            return Distribution([float(len(call.prompt))])

    async with (
        FakeServer() as server,
        controller_of(server, SERPT(), predictor=Letters()) as controller,
    ):
        with controller.start("long") as run:
            await (await run.submit("completions", body("seven!!"))).text()
            assert run.job.distribution == Distribution([7.0])


def test_a_prompt_is_text_or_messages() -> None:
    said = [{"role": "user", "content": "hi"}, {"role": "user", "content": [{"text": "you"}, {}]}]
    assert prompt_of({"prompt": "x"}) == "x"
    assert prompt_of({"messages": said}) == "user: hi\nuser: you"
    assert prompt_of({"prompt": [1, 2]}) is None
    assert prompt_of({}) is None
