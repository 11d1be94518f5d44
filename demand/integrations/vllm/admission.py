"""Admission control in front of an OpenAI-compatible server: which call is sent next."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self, Unpack, final

from demand.arguments import check_callable, check_instance, whole_number
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.integrations.job_ledger import JobDetails, JobLedger, TokenMeter
from demand.integrations.vllm.call import Call, Restart, Status
from demand.integrations.vllm.chunks import Chunk, prompt_of
from demand.integrations.vllm.failures import AttemptError, Retry, Shedding
from demand.integrations.vllm.run import Run
from demand.integrations.vllm.server import Server
from demand.policies.base import Policy, Rank
from demand.policies.job import Job
from demand.refine.estimator import DemandEstimator
from demand.refine.predictor import Predictor
from demand.units import CostModel

if TYPE_CHECKING:
    from demand.integrations.vllm.client import Client


@final
@dataclass(frozen=True)
class Counts:
    """How many calls are in which status; every call is counted exactly once.

    At any time submitted = waiting + in_flight + finished + failed + cancelled.

    Attributes:
        submitted: all calls so far.
        waiting: not sent yet, or waiting for their next attempt.
        in_flight: sent to the server, whose answer has not ended.
        finished: answered in full.
        failed: refused, or out of attempts.
        cancelled: given up by who submitted them.
    """

    submitted: int
    waiting: int
    in_flight: int
    finished: int
    failed: int
    cancelled: int


@final
class AdmissionController:
    """Holds calls back, and lets at most `in_flight` of them at a time through to the server.

    Whenever fewer are in flight, every call that waits is ranked anew by the service its run has
    attained until then, and the best is sent; ties go to the run that arrived first, then to the
    call submitted first. A call in flight is not recalled: preemption is between calls only. A
    call whose attempt fails is tried again or reported (`Retry`, `Call`); until it is sent again
    it is not in flight, and another call may be. When the server sheds load (429, 503), nothing is
    sent for as long as it asks, or for a backoff that grows while it goes on to (`Shedding`); how
    often the call had been tried plays no part. A call that cannot be ranked fails alone.

    A run keeps its turn if its next call is submitted right after the previous one has been
    awaited, with no other await between them.

    Use it as an asynchronous context manager, once, within one event loop. On leaving, it waits
    for all calls; if the block raised, it cancels them.

    Args:
        server: where the calls go.
        policy: ranks the runs of applications.
        distributions: total demand in seconds, by name of the application. A run of any other
            application is ranked by attained service, and a warning names it.
        in_flight: how many calls the server has at a time. With too few its batch is not full; the
            fewer there are, the more of the order is the policy's.
        capacity: how many calls are held at most, those in flight included; beyond it `Run.submit`
            waits. Only calls that are held are ranked, so keep it well above the number of runs.
        priority: turns a rank into the integer sent as `priority` with each call, such as
            `millisecond_priority`; for servers that order by it (vLLM with
            `--scheduling-policy priority`; others refuse the field). `None` sends none.
        retry: how often and when a call is tried again; `None` is `Retry()`.
        cost: seconds of service that a token stands for; `None` is that of the estimator, or
            `CostModel()`.
        clock: gives seconds, for policies that read the time; `None` counts from the making of the
            controller, so that ranks by time stay within the range of `millisecond_priority`.
        seed: of the random numbers that jobs draw, and of the random part of the backoff.
        estimator: in place of distributions: says what is known of a run as it starts and what is
            left of it at the end of each call, and learns from runs that finish. From here on it
            belongs to the controller; save it afterwards (`DemandEstimator.save`).
        predictor: says what is left of a run as it submits a call. Of the prompt it is told the
            text, where that is a string ("completions") or messages, which are told as lines; the
            server alone knows how many tokens that is.

    Raises:
        DemandError: an argument of the wrong kind, such as a URL in place of a `Server`, fewer
            calls in flight than one, or less capacity than in flight; openai is not installed.
    """

    def __init__(
        self,
        server: Server,
        policy: Policy,
        distributions: Mapping[str, Distribution] | None = None,
        *,
        in_flight: int,
        capacity: int = 10_000,
        priority: Callable[[Rank], int] | None = None,
        retry: Retry | None = None,
        cost: CostModel | None = None,
        clock: Callable[[], float] | None = None,
        seed: int = 0,
        estimator: DemandEstimator | None = None,
        predictor: Predictor | None = None,
    ) -> None:
        check_instance("server", server, Server, 'a server, Server("http://127.0.0.1:8000/v1")')
        retry = Retry() if retry is None else retry
        check_instance("retry", retry, Retry, "Retry(attempts=5), say, or None for the default")
        if cost is not None:
            check_instance("cost", cost, CostModel, "a CostModel, or None for the default")
        if priority is not None:
            check_callable("priority", priority, "a function such as millisecond_priority, or None")
        if clock is not None:
            check_callable("clock", clock, "a function that gives seconds, or None")
        in_flight = whole_number("in_flight", in_flight)
        capacity = whole_number("capacity", capacity)
        seed = whole_number("seed", seed)
        if not 1 <= in_flight <= capacity:
            raise DemandError(
                f"in_flight is {in_flight} and capacity is {capacity}; "
                "expected 1 <= in_flight <= capacity"
            )
        self._client = _client_of(server)
        self._ledger = JobLedger(
            policy,
            {} if distributions is None else distributions,
            seed,
            estimator=estimator,
            predictor=predictor,
            cost=cost,
        )
        self._most_in_flight = in_flight
        self._room = asyncio.Semaphore(capacity)
        self._priority = priority
        self._retry = retry
        began = time.monotonic()
        self._clock = (lambda: time.monotonic() - began) if clock is None else clock
        self._rng = random.Random(seed)
        self._waiting: list[Call] = []
        self._in_flight: dict[Call, asyncio.Task[None]] = {}
        self._over: Counter[Status] = Counter()
        self._submitted = 0
        self._shedding = Shedding(retry, self._rng)
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._entered = False
        self._open = False

    async def __aenter__(self) -> Self:
        if self._entered:
            raise DemandError(
                "the controller was entered before, and its connections are open or closed for "
                "good; make another AdmissionController"
            )
        self._entered = True
        await self._client.__aenter__()
        self._open = True
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                await self.drain()
        finally:
            await self.close()

    async def drain(self) -> None:
        """Take no more calls, and wait until those submitted are over."""
        self._open = False
        await self._idle.wait()

    async def close(self) -> None:
        """Take no more calls, cancel those that are not over, and close all connections."""
        self._open = False
        for call in (*self._waiting, *self._in_flight):
            self._cancel(call)
        await self._idle.wait()
        if self._entered:
            await self._client.__aexit__()

    @property
    def counts(self) -> Counts:
        """How many calls are in which status now."""
        return Counts(
            self._submitted,
            len(self._waiting),
            len(self._in_flight),
            self._over["finished"],
            self._over["failed"],
            self._over["cancelled"],
        )

    def start(self, application: str, **details: Unpack[JobDetails]) -> Run:
        """Start a run of `application`: the job that is ranked, of which calls are submitted.

        Args:
            application: its name.
            details: of the run, any of `deadline_seconds` (from now on), `tenant`, `weight`,
                `priority` and `demand_seconds`; see `JobDetails`.

        Raises:
            DemandError: a value of the wrong kind or out of range, or a run that the policy cannot
                rank, such as one of unknown demand under an oracle.
        """
        job = self._ledger.open(application, self._clock(), **details)
        return Run(job, self._ledger, self._clock, self._submit)

    async def _submit(
        self, run: Run, path: str, body: Mapping[str, Any], restart: Restart, unit: str
    ) -> Call:
        await self._room.acquire()
        if run.finished or not self._open:
            self._room.release()
            over = "run is finished" if run.finished else "controller is closed"
            raise DemandError(f"the {over}; submit inside its `with` block")
        meter = TokenMeter(self._ledger.cost)
        call = Call(self._submitted, run.job, path, body, restart, meter, self._cancel)
        try:
            self._ledger.loop.begin(run.job, call.number, unit, None, prompt_of(body))
        except BaseException:
            self._room.release()
            raise
        self._submitted += 1
        self._waiting.append(call)
        self._idle.clear()
        self._dispatch_soon()
        return call

    def _dispatch_soon(self) -> None:
        # After the readers that are about to be woken, so that they can submit their next call.
        asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Send the best of the calls that wait, until `in_flight` of them are on the server."""
        now = asyncio.get_running_loop().time()
        while len(self._in_flight) < self._most_in_flight and now >= self._shedding.until:
            ready = [call for call in self._waiting if call.not_before <= now]
            ranks = self._ranks(ready)
            ready = [call for call in ready if call.job in ranks]
            if not ready:
                break
            try:
                best = min(ready, key=lambda call: (ranks[call.job], call.job.index, call.number))
            except Exception as error:  # ranks that have no order: of numbers and of tuples, say
                self._cannot_rank(ready, error)
                continue
            try:
                body = self._body(best, ranks[best.job])
            except Exception as error:
                self._cannot_rank([best], error)
                continue
            self._send(best, body)
        self._set_timer(now)

    def _ranks(self, ready: list[Call]) -> dict[Job, Rank]:
        """Ranks of the jobs of `ready`; calls of a job that the policy cannot rank fail."""
        try:
            now = self._clock()
        except Exception as error:
            self._cannot_rank(ready, error)
            return {}
        ranks = {}
        for job in {call.job: None for call in ready}:
            try:
                ranks[job] = self._ledger.rank(job, now)
            except Exception as error:
                self._cannot_rank([call for call in ready if call.job is job], error)
        return ranks

    def _cannot_rank(self, calls: list[Call], error: Exception) -> None:
        for call in calls:
            self._waiting.remove(call)
            self._end(call, "failed", f"it could not be ranked: {error}", error)

    def _body(self, call: Call, rank: Rank) -> dict[str, Any]:
        body = {**call.body, "stream": True}
        if self._priority is not None:
            body["priority"] = self._priority(rank)
        return body

    def _send(self, call: Call, body: Mapping[str, Any]) -> None:
        self._waiting.remove(call)
        call.status = "in flight"
        call.attempts += 1
        call.sent_at = asyncio.get_running_loop().time()
        self._ledger.start(call.job)
        task = asyncio.get_running_loop().create_task(self._serve(call, body))
        self._in_flight[call] = task
        task.add_done_callback(partial(self._attempt_over, call))

    async def _serve(self, call: Call, body: Mapping[str, Any]) -> None:
        call.start_over()
        await self._client.attempt(call.path, body, partial(self._take, call))
        call.check_complete()

    def _take(self, call: Call, chunk: Chunk) -> None:
        self._shedding.taken(call.sent_at)
        self._ledger.serve(call.job, call.take(chunk), self._clock())
        self._ledger.loop.count(call.job, call.number, *call.tokens)

    def _attempt_over(self, call: Call, task: asyncio.Task[None]) -> None:
        """End a call whose attempt is over, or let it wait for another attempt."""
        del self._in_flight[call]
        if all(other.job is not call.job for other in self._in_flight):
            self._ledger.stop(call.job)
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or (error is not None and call.given_up):
            self._end(call, "cancelled", "given up")
        elif error is None:
            self._end(call, "finished")
        elif (delay := self._delay(call, error)) is None:
            self._end(call, "failed", str(error), error)
        else:
            call.status = "waiting"
            call.not_before = asyncio.get_running_loop().time() + delay
            self._waiting.append(call)
        self._dispatch_soon()

    def _delay(self, call: Call, error: BaseException) -> float | None:
        """Seconds until `call` is tried again; `None` if it is not."""
        if not isinstance(error, AttemptError):
            return None
        if error.shed:
            self._shedding.refused(error, call.sent_at, asyncio.get_running_loop().time())
        delay = self._retry.delay_seconds(error, call.attempts, self._rng)
        return delay if call.may_restart else None

    def _cancel(self, call: Call) -> None:
        call.given_up = True  # also if its attempt has just failed, and it is about to wait again
        if call in self._in_flight:
            self._in_flight[call].cancel()
        elif call in self._waiting:
            self._waiting.remove(call)
            self._end(call, "cancelled", "given up")

    def _end(
        self, call: Call, status: Status, reason: str = "", cause: BaseException | None = None
    ) -> None:
        self._over[status] += 1
        self._room.release()
        try:
            self._ledger.loop.end(call.job, call.number, status == "finished")
        finally:  # an estimator that fails leaves no reader waiting
            call.end(status, reason, cause)
            if not self._waiting and not self._in_flight:
                self._idle.set()

    def _set_timer(self, now: float) -> None:
        """Dispatch again when the next retry is due, unless a call ends or is submitted before."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting and len(self._in_flight) < self._most_in_flight:
            due = max(self._shedding.until, min(call.not_before for call in self._waiting))
            self._timer = asyncio.get_running_loop().call_later(due - now, self._dispatch)


def _client_of(server: Server) -> "Client":
    try:
        import openai  # noqa: F401  # what the module below stands on
    except ImportError as error:
        raise DemandError(
            "calls over HTTP need openai; pip install 'picache[integrations]'"
        ) from error
    from demand.integrations.vllm.client import Client

    return Client(server)
