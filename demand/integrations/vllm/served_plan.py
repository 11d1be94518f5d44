"""A plan in front of a server: each call is submitted as soon as those it waits for are over."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from inspect import isawaitable
from typing import Any, final

from demand.dependencies import After
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.integrations.plans import OpenPlan, Planned
from demand.integrations.vllm.call import Call
from demand.units import Execution, ParallelCalls


@final
class ServedPlan:
    """Executes a plan once, by what a run of an `AdmissionController` can do.

    What a unit that ends makes ready is submitted by the task that waited for it, without an await
    between, so that the run keeps its turn.

    Args:
        plan: as for `OpenPlan`.
        parallel_calls: as for `OpenPlan`.
        submit: a request and the name of its unit to the controller.
        record: what was executed elsewhere.
        over: positions in the run of what is over by now, as `Execution.after` of a unit that
            begins; `None` if nobody records it.
        expect: takes the distribution of the seconds that are left.
    """

    def __init__(
        self,
        plan: Sequence[Planned],
        parallel_calls: ParallelCalls,
        *,
        submit: Callable[[Any, str], Awaitable[Call]],
        record: Callable[[Execution], None],
        over: Callable[[], After],
        expect: Callable[[Distribution], None],
    ) -> None:
        self._open = OpenPlan(plan, parallel_calls)
        self._submit, self._record, self._over, self._expect = submit, record, over, expect
        self._received: dict[int, Callable[[], float]] = {}
        self._calls: list[Call] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def executed(self) -> list[Any]:
        """What every unit gave: a call its text, any other unit what its awaitable did.

        Raises:
            PlanError: units failed, all others that could be are over.
        """
        self._tell()
        try:
            await self._begin_ready()
            while self._tasks:
                done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
                self._tasks -= done
                for task in done:
                    task.result()  # what was expected of a unit cannot be told: the policy failed
        finally:  # nothing is left of a plan that ended well
            for call in self._calls:
                if not call.over:
                    call.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        return self._open.outcome()

    async def _begin_ready(self) -> None:
        for position in self._open.take_ready():
            try:
                given = await self._begun(position)
            except Exception as error:
                self._open.fail(position, error)
            else:
                task = asyncio.get_running_loop().create_task(self._finish(position, given))
                self._tasks.add(task)

    async def _begun(self, position: int) -> Callable[[], Awaitable[Any]]:
        """Begin a unit; what to await for what it gives."""
        unit = self._open.plan[position].unit
        made = self._open.begin(position)
        if unit.kind == "llm":
            call = await self._submit(made, unit.name)
            self._calls.append(call)
            self._received[position] = lambda: call.service_seconds
            return call.text
        if not isawaitable(made):
            raise DemandError(
                f"make of {unit.name!r} gives {made!r:.200}; expected an awaitable, such as an "
                "async function gives: asyncio.to_thread(f) is one for a function that blocks"
            )
        clock = asyncio.get_running_loop().time
        begun, after = clock(), self._over()
        self._received[position] = lambda: clock() - begun

        async def elsewhere() -> Any:
            value = await made
            self._record(Execution(unit, seconds=clock() - begun, after=after))
            return value

        return elsewhere

    async def _finish(self, position: int, given: Callable[[], Awaitable[Any]]) -> None:
        try:
            value = await given()
        except Exception as error:
            self._open.fail(position, error)
        else:
            self._open.end(position, value)
        self._tell()
        await self._begin_ready()

    def _tell(self) -> None:
        left = self._open.remaining(self._had)
        if left is not None:
            self._expect(left)

    def _had(self, position: int) -> float:
        """Seconds of service of a unit that has begun; none while it waits to be held at all."""
        return self._received[position]() if position in self._received else 0.0
