"""A plan in continuous batching: each request is made as soon as those it waits for are over."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import Any, final

from demand.arguments import check_callable, check_instance
from demand.dependencies import After
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.integrations.plans import OpenPlan, Planned
from demand.units import Execution, ParallelCalls, Unit


@final
class BatchedPlan:
    """Executes a plan once, by what a `Batching` can do for one job.

    Requests are made in the thread that executes it; threads of its own wait for them and run what
    is no request.

    Args:
        plan: as for `OpenPlan`.
        parallel_calls: as for `OpenPlan`.
        submit: makes a request of a unit's name and the keywords of `Batching.request`; its id.
        result: waits for a request, and gives its tokens.
        cancel: cancels a request.
        record: what was executed elsewhere.
        over: positions in the run of what is over by now, as `Execution.after` of a unit that
            begins; `None` if nobody records it.
        received: seconds of service that a request has had.
        expect: takes the distribution of the seconds that are left.
    """

    def __init__(
        self,
        plan: Sequence[Planned],
        parallel_calls: ParallelCalls,
        *,
        submit: Callable[[str, Mapping[str, Any]], str],
        result: Callable[[str], list[int]],
        cancel: Callable[[str], None],
        record: Callable[[Execution], None],
        over: Callable[[], After],
        received: Callable[[str], float],
        expect: Callable[[Distribution], None],
    ) -> None:
        self._open = OpenPlan(plan, parallel_calls)
        self._submit, self._result, self._cancel = submit, result, cancel
        self._record, self._over, self._received = record, over, received
        self._expect = expect
        self._service: dict[int, Callable[[], float]] = {}
        self._requests: dict[int, str] = {}  # of the units underway

    def executed(self) -> list[Any]:
        """What every unit gave: a request its tokens, any other unit what its function did.

        Raises:
            PlanError: units failed, all others that could be are over.
        """
        self._tell()
        with ThreadPoolExecutor(len(self._open.plan), "plan") as pool:
            try:
                waiting = self._begin_ready(pool)
                while waiting:
                    ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in sorted(ended, key=waiting.__getitem__):
                        self._take_in(waiting.pop(future), future)
                        self._tell()
                        waiting |= self._begin_ready(pool)
            except BaseException:
                for request_id in self._requests.values():
                    with suppress(DemandError):  # it has ended meanwhile
                        self._cancel(request_id)  # which ends the waiting of its thread, too
                raise
        return self._open.outcome()

    def _begin_ready(self, pool: ThreadPoolExecutor) -> dict[Future[Any], int]:
        begun = {}
        for position in self._open.take_ready():
            try:
                begun[pool.submit(self._begun(position))] = position
            except Exception as error:
                self._open.fail(position, error)
        return begun

    def _begun(self, position: int) -> Callable[[], Any]:
        """Begin a unit; the function that waits for what it gives."""
        unit = self._open.plan[position].unit
        made = self._open.begin(position)
        if unit.kind == "llm":
            expected = "what `request` takes, {'input_ids': ids, 'max_new_tokens': 64}"
            check_instance(f"what make of {unit.name!r} gives", made, Mapping, expected)
            self._requests[position] = request_id = self._submit(unit.name, made)
            self._service[position] = partial(self._received, request_id)
            return partial(self._result, request_id)
        check_callable(f"what make of {unit.name!r} gives", made, "a function of no arguments")
        begun, after = time.monotonic(), self._over()
        self._service[position] = lambda: time.monotonic() - begun
        return partial(self._elsewhere, unit, made, begun, after)

    def _elsewhere(self, unit: Unit, made: Callable[[], Any], begun: float, after: After) -> Any:
        value = made()
        self._record(Execution(unit, seconds=time.monotonic() - begun, after=after))
        return value

    def _take_in(self, position: int, future: Future[Any]) -> None:
        self._requests.pop(position, None)
        error = future.exception()
        if isinstance(error, Exception):
            self._open.fail(position, error)
        else:
            self._open.end(position, future.result())

    def _tell(self) -> None:
        left = self._open.remaining(lambda position: self._service[position]())
        if left is not None:
            self._expect(left)
