"""A server that fails: every call is retried with a bound or reported, and none is lost."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import FCFS, DemandError, Distribution, Gittins
from demand.integrations.vllm import (
    AdmissionController,
    CallError,
    Counts,
    Retry,
    Server,
    StreamBrokenError,
)
from demand.integrations.vllm.chunks import Repetition, TokenCount, text_of
from demand.integrations.vllm.failures import AttemptError, Shedding, retry_after_seconds
from tests.demand.openai_server import (
    Answer,
    FakeServer,
    Received,
    body,
    run_async,
    tokens_of,
)

QUICK = Retry(attempts=3, first_seconds=0.001, longest_seconds=0.2)
KNOWN = {"short": Distribution([2.0]), "long": Distribution([1.0, 90.0])}

FAULTS: dict[str, Callable[[Received], Answer]] = {
    "status 500": lambda r: Answer(status=500),
    "status 503": lambda r: Answer(status=503),
    "status 429": lambda r: Answer(status=429, headers=(("Retry-After", "0"),)),
    "status 408": lambda r: Answer(status=408),
    "no answer": lambda r: Answer(fault="close", after=-1),
    "reset at once": lambda r: Answer(fault="reset", after=-1),
    "silence before the headers": lambda r: Answer(fault="hang", after=-1),
    "silence in the stream": lambda r: Answer(tokens_of(r), fault="hang", after=1),
    "cut off, properly closed": lambda r: Answer(tokens_of(r), fault="cut", after=2),
    "dropped in the stream": lambda r: Answer(tokens_of(r), fault="close", after=2),
    "reset in the stream": lambda r: Answer(tokens_of(r), fault="reset", after=1),
    "not JSON": lambda r: Answer(tokens_of(r), fault="garbage", after=1),
    "JSON, not an object": lambda r: Answer(tokens_of(r), fault="not an object", after=1),
    "an error in the stream": lambda r: Answer(tokens_of(r), fault="error", after=2),
    "not a stream": lambda r: Answer(tokens_of(r), content_type="text/html"),
    "slower than an attempt may take": lambda r: Answer(("a.0 ", *[""] * 14), token_seconds=0.1),
}


def controller_of(server: FakeServer, in_flight: int = 1, **options: Any) -> AdmissionController:
    options = {"retry": QUICK, "policy": FCFS()} | options
    where = Server(server.url, silence_seconds=0.25, attempt_seconds=0.6)
    return AdmissionController(where, distributions=KNOWN, in_flight=in_flight, **options)


class Script:
    """Answers the n-th attempt at a prompt by the n-th of `answers`, further ones in full."""

    def __init__(self, *answers: Callable[[Received], Answer]) -> None:
        self.answers = answers
        self.attempts: dict[str, int] = defaultdict(int)

    def __call__(self, request: Received) -> Answer:
        prompt = request.body["prompt"]
        self.attempts[prompt] += 1
        if self.attempts[prompt] <= len(self.answers):
            return self.answers[self.attempts[prompt] - 1](request)
        return Answer(tokens_of(request))


@pytest.mark.parametrize("fault", FAULTS)
@run_async
async def test_a_failed_attempt_is_made_again(fault: str) -> None:
    async with FakeServer(Script(FAULTS[fault])) as server:
        async with controller_of(server) as controller:
            run = controller.start("short")
            call = await run.submit("completions", body("a"))
            assert await call.text() == "a.0 a.1 a.2 "
        assert call.attempts == len(server.received) == 2
        # Tokens that were generated twice were attained once.
        assert run.job.attained_service == pytest.approx(3 * 0.06 + 10 * 1e-4)
        assert controller.counts == Counts(1, 0, 0, 1, 0, 0)


@pytest.mark.parametrize("fault", FAULTS)
@run_async
async def test_attempts_are_bounded_and_the_last_failure_is_reported(fault: str) -> None:
    async with FakeServer(FAULTS[fault]) as server:
        async with controller_of(server) as controller:
            call = await controller.start("short").submit("completions", body("a"))
            with pytest.raises(CallError, match="failed after 3 attempts, 0 chunks handed"):
                await call.text()
        assert len(server.received) == 3
        assert controller.counts == Counts(1, 0, 0, 0, 1, 0)


@run_async
async def test_a_server_that_is_not_there_is_reported() -> None:
    async with FakeServer() as server:
        pass
    async with controller_of(server) as controller:
        call = await controller.start("short").submit("completions", body("a"))
        with pytest.raises(CallError, match="ConnectError"):
            await call.text()
    assert call.attempts == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
@run_async
async def test_what_the_server_refuses_is_not_sent_again(status: int) -> None:
    answer = Answer(status=status, error_body="x" * 10_000)
    async with FakeServer(lambda r: answer) as server, controller_of(server) as controller:
        call = await controller.start("short").submit("completions", body("a"))
        with pytest.raises(CallError, match=f"after 1 attempts.*status {status}: xxx") as error:
            await call.text()
        assert len(str(error.value)) < 700
        assert len(server.received) == 1


@run_async
async def test_a_stream_without_its_closing_mark_is_complete_once_every_choice_has_finished() -> (
    None
):
    script = lambda r: Answer(tokens_of(r), fault="no done", after=99)  # noqa: E731
    async with FakeServer(script) as server, controller_of(server) as controller:
        call = await controller.start("short").submit("completions", body("a"))
        assert await call.text() == "a.0 a.1 a.2 "
        two = await controller.start("short").submit("completions", {**body("b"), "n": 2})
        with pytest.raises(CallError, match="broke off"):
            await two.text()


@run_async
async def test_a_stream_with_its_closing_mark_is_complete_whatever_its_choices_say() -> None:
    async with FakeServer() as server, controller_of(server) as controller:
        call = await controller.start("short").submit("completions", {**body("a"), "n": 2})
        assert await call.text() == "a.0 a.1 a.2 "  # of one choice


@run_async
async def test_shed_load_pauses_every_call_as_long_as_the_server_asks() -> None:
    script = Script(lambda r: Answer(status=429) if r.body["prompt"] == "a" else Answer(("x",)))
    async with FakeServer(script) as server:
        retry = Retry(first_seconds=0.1, longest_seconds=0.5)
        async with controller_of(server, in_flight=1, retry=retry) as controller:
            run = controller.start("short")
            calls = [await run.submit("completions", body(p)) for p in "abc"]
            for call in calls:
                await call.text()
        first, *others = server.received
        assert others[0].second - first.second >= 0.05  # half of first_seconds
        assert sorted(server.prompts[1:]) == ["a", "b", "c"]
        assert calls[1].attempts == calls[2].attempts == 1


@run_async
async def test_a_refused_last_attempt_holds_up_the_other_calls_no_longer_than_a_first_one() -> None:
    """How often the refused call was tried, and whether it is again, is no concern of others."""
    script = lambda r: Answer(tokens_of(r), status=503 if r.body["prompt"] == "a" else 200)  # noqa: E731
    async with FakeServer(script) as server:
        retry = Retry(attempts=1, first_seconds=0.1, longest_seconds=30.0)
        async with controller_of(server, in_flight=1, retry=retry) as controller:
            run = controller.start("short")
            calls = [await run.submit("completions", body(p)) for p in "abc"]
            with pytest.raises(CallError, match="failed after 1 attempts"):
                await calls[0].text()
        first, second, third = server.received
        assert 0.05 <= second.second - first.second < 5.0
        assert third.second - second.second < 5.0
        assert controller.counts == Counts(3, 0, 0, 2, 1, 0)


def test_a_pause_grows_by_what_is_refused_after_it_and_not_by_a_burst() -> None:
    retry = Retry(attempts=9, first_seconds=1.0, longest_seconds=8.0)
    refusal = AttemptError("", again=True, shed=True)
    shedding = Shedding(retry, random.Random(0))
    for _ in range(64):  # all on their way when the first was refused
        shedding.refused(refusal, sent=0.0, now=10.0)
    assert 10.5 <= shedding.until <= 11.0
    for at, longest in ((20.0, 2.0), (30.0, 4.0), (40.0, 8.0), (60.0, 8.0)):
        shedding.refused(refusal, sent=at, now=at)
        assert at + longest / 2 <= shedding.until <= at + longest
    shedding.taken(sent=5.0)  # before all this: it says nothing about the load
    shedding.refused(refusal, sent=80.0, now=80.0)
    assert 84.0 <= shedding.until <= 88.0
    shedding.taken(sent=90.0)
    shedding.refused(refusal, sent=100.0, now=100.0)
    assert 100.5 <= shedding.until <= 101.0
    asks = lambda n: AttemptError("", again=True, shed=True, retry_after_seconds=n)  # noqa: E731
    shedding.refused(asks(5.0), sent=99.0, now=101.0)  # of the burst, but the server asks
    assert shedding.until == 106.0
    shedding.refused(asks(3600.0), sent=200.0, now=200.0)
    assert shedding.until == 208.0


def test_a_server_that_sheds_load_for_ever_is_asked_for_ever() -> None:
    shedding = Shedding(Retry(longest_seconds=4.0), random.Random(0))
    for at in range(0, 12_000, 10):
        shedding.refused(AttemptError("", again=True, shed=True), sent=at, now=at)
        assert shedding.until <= at + 4.0


@run_async
async def test_a_failure_other_than_shedding_holds_up_no_other_call() -> None:
    script = Script(lambda r: Answer(status=500 if r.body["prompt"] == "a" else 200))
    async with FakeServer(script) as server:
        retry = Retry(first_seconds=0.4, longest_seconds=0.4)
        async with controller_of(server, in_flight=1, retry=retry) as controller:
            run = controller.start("short")
            for prompt in "abc":
                await run.submit("completions", body(prompt))
        assert server.prompts == ["a", "b", "c", "a"]
        assert controller.counts == Counts(3, 0, 0, 3, 0, 0)


@run_async
async def test_a_retry_after_that_is_too_long_is_reported_not_shortened() -> None:
    answer = Answer(status=503, headers=(("Retry-After", "3600"),))
    async with FakeServer(lambda r: answer) as server, controller_of(server) as controller:
        call = await controller.start("short").submit("completions", body("a"))
        with pytest.raises(CallError, match="after 1 attempts"):
            await call.text()


def test_delays_double_up_to_their_bound_and_respect_the_server() -> None:
    retry = Retry(attempts=9, first_seconds=1.0, longest_seconds=5.0)
    rng = random.Random(0)
    broken = AttemptError("", again=True)
    for attempts, most in enumerate([1.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0, 5.0], start=1):
        delay = retry.delay_seconds(broken, attempts, rng)
        assert delay is not None
        assert most / 2 <= delay <= most
    assert retry.delay_seconds(broken, 9, rng) is None
    assert retry.delay_seconds(AttemptError("", again=False), 1, rng) is None
    asks = lambda seconds: AttemptError("", again=True, retry_after_seconds=seconds)  # noqa: E731
    assert retry.delay_seconds(asks(4.5), 1, rng) == 4.5
    assert retry.delay_seconds(asks(5.1), 1, rng) is None
    with pytest.raises(DemandError, match=r"attempts is 1\.5; expected a whole number"):
        Retry(attempts=1.5)  # type: ignore[arg-type]
    with pytest.raises(DemandError, match="attempts is 0"):
        Retry(attempts=0)
    with pytest.raises(DemandError, match="longest_seconds holds text"):
        Retry(longest_seconds="30")  # type: ignore[arg-type]
    with pytest.raises(DemandError, match="first_seconds is 2"):
        Retry(first_seconds=2.0, longest_seconds=1.0)


def test_retry_after_is_seconds_or_a_date() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    later = format_datetime(datetime(2026, 1, 1, 0, 0, 30, tzinfo=UTC), usegmt=True)
    assert retry_after_seconds(later, now.timestamp()) == 30.0
    assert retry_after_seconds(later, now.timestamp() + 99) == 0.0
    assert retry_after_seconds(" 7 ", 0.0) == 7.0
    for nothing in (None, "soon", "-3", "", "²"):
        assert retry_after_seconds(nothing, 0.0) is None


@run_async
async def test_cancelling_at_the_moment_of_a_failure_ends_the_call() -> None:
    answer = Answer(status=500)
    async with FakeServer(lambda r: answer) as server, controller_of(server) as controller:
        call = await controller.start("short").submit("completions", body("a"))
        while call not in controller._in_flight:
            await asyncio.sleep(0)
        while not controller._in_flight[call].done():
            await asyncio.sleep(0)
        assert call in controller._in_flight  # failed, and not yet put back to wait
        call.cancel()
        with pytest.raises(CallError, match="cancelled after 1 attempts"):
            await call.text()


class TestStreamsThatBreakWhileTheyAreRead:
    """What was handed over cannot be taken back."""

    @staticmethod
    async def read(
        server: FakeServer, restart: Any, broken: list[str], chat: bool = False
    ) -> AdmissionController:
        """Reads "a" into `broken` chunk by chunk."""
        async with controller_of(server) as controller:
            path = "chat/completions" if chat else "completions"
            call = await controller.start("short").submit(path, body("a"), restart)
            try:
                async for chunk in call:
                    broken += filter(None, [text_of(chunk)])
            finally:
                assert len(server.received) == call.attempts
        return controller

    def test_raise_reports_after_all_that_arrived(self) -> None:
        texts: list[str] = []

        async def test() -> None:
            async with FakeServer(Script(FAULTS["dropped in the stream"])) as server:
                with pytest.raises(StreamBrokenError, match="after 1 attempts, 2 chunks handed"):
                    await self.read(server, "raise", texts)

        asyncio.run(test())
        assert texts == ["a.0 ", "a.1 "]

    @pytest.mark.parametrize("chat", [False, True])
    def test_skip_goes_on_where_the_reader_stands(self, chat: bool) -> None:
        texts: list[str] = []

        def other_pieces(request: Received) -> Answer:  # the same text, cut differently
            return Answer(("", "a.", "0 a.1 a", ".2 "))

        async def test() -> None:
            script = Script(FAULTS["cut off, properly closed"], FAULTS["not JSON"], other_pieces)
            async with FakeServer(script) as server:
                controller = await self.read(server, "skip", texts, chat)
                assert len(server.received) == 3
                assert controller.counts == Counts(1, 0, 0, 1, 0, 0)

        asyncio.run(test())
        assert texts == ["a.0 ", "a.1 ", "a", ".2 "]

    @pytest.mark.parametrize(
        "other", [("a.0 ", "b.1 "), ("a.0 ",), ("a.0 ", "a")], ids=["other", "short", "cut"]
    )
    def test_skip_never_mixes_two_texts(self, other: tuple[str, ...]) -> None:
        texts: list[str] = []

        async def test() -> None:
            script = Script(FAULTS["dropped in the stream"], lambda r: Answer(other))
            async with FakeServer(script) as server:
                with pytest.raises(StreamBrokenError, match="differs from what was handed over"):
                    await self.read(server, "skip", texts)

        asyncio.run(test())
        assert texts == ["a.0 ", "a.1 "]

    def test_what_nobody_has_read_yet_is_dropped_and_the_call_is_made_again(self) -> None:
        async def test() -> None:
            script = Script(FAULTS["dropped in the stream"])
            async with FakeServer(script) as server, controller_of(server) as controller:
                call = await controller.start("short").submit("completions", body("a"))
                while call.attempts < 2:
                    await asyncio.sleep(0.001)
                assert [c["choices"][0]["text"] async for c in call if c["choices"]] == [
                    "a.0 ",
                    "a.1 ",
                    "a.2 ",
                ]

        asyncio.run(test())


pieces = st.lists(st.text("ab", max_size=3), max_size=8)


def completion(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


@given(pieces, pieces)
def test_a_repetition_hands_over_exactly_what_is_new(first: list[str], second: list[str]) -> None:
    repetition = Repetition(map(completion, first))
    had, told = "".join(first), "".join(second)
    passed = []
    try:
        for text in second:
            chunk = repetition.beyond(completion(text))
            passed += [] if chunk is None else [chunk["choices"][0]["text"]]
        repetition.check_over()
    except AttemptError:
        assert not told.startswith(had)
        assert not any(passed)
    else:
        assert had + "".join(passed) == told


def test_only_the_text_of_one_choice_can_be_repeated() -> None:
    for extra in (
        {"index": 1, "text": "a"},
        {"index": 0, "text": "a", "logprobs": {"tokens": ["a"]}},
        {"index": 0, "delta": {"tool_calls": [{"id": "x"}]}},
    ):
        with pytest.raises(AttemptError, match="more than the text of one choice"):
            Repetition([{"choices": [extra]}])


def test_tokens_are_counted_by_usage_where_there_is_any() -> None:
    count = TokenCount()
    count.add(completion("two words"))
    count.add({**completion("!"), "usage": None})
    assert (count.input_tokens, count.output_tokens) == (0, 2)
    count.add({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
    count.add({"choices": [], "usage": {"prompt_tokens": "many", "completion_tokens": -1}})
    assert (count.input_tokens, count.output_tokens) == (7, 3)


@pytest.mark.parametrize(
    ("delta", "tokens"),
    [
        ({"role": "assistant", "content": ""}, 0),
        ({"role": "assistant", "content": None, "tool_calls": []}, 0),
        ({}, 0),
        ({"content": "so"}, 1),
        ({"reasoning_content": "so"}, 1),
        ({"content": None, "reasoning": "so"}, 1),
        ({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}, 1),
        ({"content": "so", "tool_calls": [{"index": 0, "function": {"name": "look"}}]}, 1),
        ({"refusal": "no"}, 1),
    ],
    ids=str,
)
def test_whatever_was_generated_counts_without_usage(delta: dict[str, Any], tokens: int) -> None:
    count = TokenCount()
    for _ in range(3):
        count.add({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    count.add({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    assert count.output_tokens == 3 * tokens


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000))
def test_no_call_is_lost_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    faults = [f for name, f in FAULTS.items() if "silence" not in name and "slow" not in name]

    def chaos(request: Received) -> Answer:
        return rng.choice(faults)(request) if rng.random() < 0.4 else Answer(tokens_of(request))

    def check(controller: AdmissionController, submitted: int) -> None:
        counts = controller.counts
        assert counts.submitted == submitted
        over = counts.finished + counts.failed + counts.cancelled
        assert submitted == counts.waiting + counts.in_flight + over
        assert counts.in_flight <= 4

    async def storm() -> None:
        ends: dict[str, int] = defaultdict(int)
        submitted = 0

        async def read(run: Any, number: int, controller: AdmissionController) -> None:
            nonlocal submitted
            call = await run.submit(
                "completions", body(str(number), rng.randrange(1, 6)), rng.choice(["raise", "skip"])
            )
            submitted += 1
            check(controller, submitted)
            want = "".join(f"{number}.{i} " for i in range(call.body["max_tokens"]))
            got = ""
            streamed = rng.random() < 0.5
            if rng.random() < 0.15:
                asyncio.get_running_loop().call_later(rng.random() * 0.01, call.cancel)
            try:
                if streamed:
                    async for chunk in call:
                        got += "".join(choice["text"] for choice in chunk["choices"])
                else:
                    got = await call.text()
            except CallError:
                assert call.status in ("failed", "cancelled")
                assert want.startswith(got)
            else:
                assert (call.status, got) == ("finished", want)
            ends[call.status] += 1
            check(controller, submitted)

        async with FakeServer(chaos) as server:
            async with controller_of(server, 4, policy=Gittins(), capacity=20) as controller:
                runs = [controller.start(rng.choice(["short", "long"])) for _ in range(10)]
                readers = (read(runs[i % 10], i, controller) for i in range(50))
                await asyncio.gather(*readers)
            counts = controller.counts
            assert (counts.submitted, counts.waiting, counts.in_flight) == (50, 0, 0)
            assert ends == {
                name: number
                for name, number in (
                    ("finished", counts.finished),
                    ("failed", counts.failed),
                    ("cancelled", counts.cancelled),
                )
                if number
            }

    asyncio.run(storm())
