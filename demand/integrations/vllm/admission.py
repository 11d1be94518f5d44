"""Admission control in front of an OpenAI-compatible server: the order is decided here."""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self, final

from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.integrations.job_ledger import Ledger, TokenMeter
from demand.integrations.vllm.call import Call, Restart, Status
from demand.integrations.vllm.failures import AttemptError, Retry
from demand.integrations.vllm.run import Run
from demand.integrations.vllm.server import Server
from demand.policies.base import Policy, Rank
from demand.units import CostModel

if TYPE_CHECKING:
    from demand.integrations.vllm.client import Client


@final
@dataclass(frozen=True)
class Counts:
    """Where the calls stand: submitted = waiting + in_flight + finished + failed + cancelled."""

    submitted: int
    waiting: int
    in_flight: int
    finished: int
    failed: int
    cancelled: int


@final
class AdmissionController:
    """Holds calls back, and lets `in_flight` of them at a time through to the server.

    Whenever a place is free, every call that waits is ranked anew by what its application has
    attained until then, and the best goes; ties go to the application that arrived first, then to
    the call submitted first. A call on the server is not recalled: order is decided between calls.
    A call that fails is tried again or reported (`Retry`, `Call`); it gives its place up while it
    waits. When the server sheds load (429, 503), nothing is sent until the delay is over.

    The next call of a run keeps the run's turn if it is submitted as soon as the previous one has
    been awaited, with no other await between them.

    Use it as an asynchronous context manager, once, within one event loop. On leaving, it waits
    for all calls; if the block raised, it cancels them.

    Args:
        server: where the calls go.
        policy: ranks the applications.
        distributions: their total demand in seconds, by name; see `Ledger` for unknown names.
        in_flight: W, how many calls the server has at a time. Too few starve its batch; the
            smaller it is, the more of the order is the policy's.
        capacity: calls held at most, in flight included; `Run.submit` waits for room. Only calls
            that are held are ranked, so keep it well above the number of applications.
        priority: makes of a rank the integer sent as `priority` with each call, such as
            `millisecond_priority`; for servers that order by it (vLLM with
            `--scheduling-policy priority`; others refuse the field). `None` sends none.
        retry: how often and when a call is tried again.
        cost: seconds of service that a token stands for.
        clock: seconds, for policies that read the time; `None` counts from now on, so that ranks
            by time stay within what `millisecond_priority` tells apart.
        seed: of the policy's lottery and of the backoff.

    Raises:
        DemandError: no places, or fewer held than in flight; openai not installed.
    """

    def __init__(
        self,
        server: Server,
        policy: Policy,
        distributions: Mapping[str, Distribution],
        *,
        in_flight: int,
        capacity: int = 10_000,
        priority: Callable[[Rank], int] | None = None,
        retry: Retry | None = None,
        cost: CostModel | None = None,
        clock: Callable[[], float] | None = None,
        seed: int = 0,
    ) -> None:
        if not 1 <= in_flight <= capacity:
            raise DemandError(
                f"in_flight is {in_flight} and capacity is {capacity}; "
                "expected 1 <= in_flight <= capacity"
            )
        self._client = _client_of(server)
        self._ledger = Ledger(policy, distributions, seed)
        self._places = in_flight
        self._room = asyncio.Semaphore(capacity)
        self._priority = priority
        self._retry = Retry() if retry is None else retry
        self._cost = CostModel() if cost is None else cost
        began = time.monotonic()
        self._clock = (lambda: time.monotonic() - began) if clock is None else clock
        self._rng = random.Random(seed)
        self._waiting: list[Call] = []
        self._in_flight: dict[Call, asyncio.Task[None]] = {}
        self._over: Counter[Status] = Counter()
        self._submitted = 0
        self._shed_until = -math.inf
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
        """Where the calls stand now."""
        return Counts(
            self._submitted,
            len(self._waiting),
            len(self._in_flight),
            self._over["finished"],
            self._over["failed"],
            self._over["cancelled"],
        )

    def start(self, application: str, **known: Any) -> Run:
        """A run of `application` begins; it is the unit that is ranked.

        Args:
            application: its name.
            known: `deadline_seconds`, `tenant`, `weight`, `priority`, `demand_seconds`, as for
                `Ledger.open`.

        Raises:
            DemandError: as for `Ledger.open`.
        """
        job = self._ledger.open(application, self._clock(), **known)
        return Run(job, self._ledger, self._clock, self._submit)

    async def _submit(self, run: Run, path: str, body: Mapping[str, Any], restart: Restart) -> Call:
        await self._room.acquire()
        if run.finished or not self._open:
            self._room.release()
            over = "run is finished" if run.finished else "controller is closed"
            raise DemandError(f"the {over}; submit inside its `with` block")
        meter = TokenMeter(self._cost)
        call = Call(self._submitted, run.job, path, body, restart, meter, self._cancel)
        self._submitted += 1
        self._waiting.append(call)
        self._idle.clear()
        self._dispatch_soon()
        return call

    def _dispatch_soon(self) -> None:
        # After the readers that are about to be woken, so that they can submit their next call.
        asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Fill the free places with the best of the calls that wait."""
        now = asyncio.get_running_loop().time()
        while len(self._in_flight) < self._places and now >= self._shed_until:
            ready = [call for call in self._waiting if call.not_before <= now]
            if not ready:
                break
            try:
                self._send(*self._best(ready))
            except Exception as error:  # of a policy: the calls that it cannot order are reported
                for call in self._waiting.copy():
                    self._waiting.remove(call)
                    self._end(call, "failed", f"it could not be ranked: {error}", error)
        self._set_timer(now)

    def _best(self, ready: list[Call]) -> tuple[Call, Rank]:
        now = self._clock()
        ranks = {job: self._ledger.rank(job, now) for job in {call.job for call in ready}}
        best = min(ready, key=lambda call: (ranks[call.job], call.job.index, call.number))
        return best, ranks[best.job]

    def _send(self, call: Call, rank: Rank) -> None:
        body = {**call.body, "stream": True}
        if self._priority is not None:
            body["priority"] = self._priority(rank)
        self._waiting.remove(call)
        call.status = "in flight"
        call.attempts += 1
        self._ledger.start(call.job)
        task = asyncio.get_running_loop().create_task(self._serve(call, body))
        self._in_flight[call] = task
        task.add_done_callback(partial(self._settle, call))

    async def _serve(self, call: Call, body: Mapping[str, Any]) -> None:
        call.start_over()
        await self._client.attempt(
            call.path,
            body,
            lambda chunk: self._ledger.serve(call.job, call.take(chunk), self._clock()),
        )
        call.check_complete()

    def _settle(self, call: Call, task: asyncio.Task[None]) -> None:
        """An attempt is over: the one place where a call leaves the server."""
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
        delay = self._retry.delay_seconds(error, call.attempts, self._rng)
        if error.shed:
            asked = self._retry.longest_seconds if delay is None else delay
            until = asyncio.get_running_loop().time() + asked
            self._shed_until = max(self._shed_until, until)
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
        call.end(status, reason, cause)
        if not self._waiting and not self._in_flight:
            self._idle.set()

    def _set_timer(self, now: float) -> None:
        """Dispatch again when the next retry is due, if nothing else does so before."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting and len(self._in_flight) < self._places:
            due = max(self._shed_until, min(call.not_before for call in self._waiting))
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
