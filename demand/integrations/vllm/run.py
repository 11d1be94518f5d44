"""One run of an application: calls to one server that are ranked together."""

import json
import reprlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self, final, get_args

from demand.arguments import warn_renamed_method
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.integrations.job_ledger import JobLedger
from demand.integrations.learning import CALL
from demand.integrations.plans import Planned
from demand.integrations.vllm.call import Call, Restart
from demand.integrations.vllm.served_plan import ServedPlan
from demand.policies.job import Job
from demand.units import Execution, ParallelCalls

_PATHS = ("chat/completions", "completions")
_OWN_FIELDS = ("priority", "stream")
_USAGE = {"stream_options": {"include_usage": True}}

Submit = Callable[["Run", str, Mapping[str, Any], Restart, str], Awaitable[Call]]
"""How a run hands a path, a body, `restart` and the name of the unit to its controller."""


@final
class Run:
    """A run of an application, from `AdmissionController.start` to `finish`; a context manager.

    Its calls, one after another or side by side, add to the service that the policy ranks it by.

    Attributes:
        job: what the policy sees of it.
        finished: whether `finish` was called.
    """

    def __init__(
        self, job: Job, ledger: JobLedger, clock: Callable[[], float], submit: Submit
    ) -> None:
        self.job = job
        self._ledger = ledger
        self._clock = clock
        self._submit = submit
        self._calls: list[Call] = []
        self.finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._finish(whole=kind is None)

    async def submit(
        self, path: str, body: Mapping[str, Any], restart: Restart = "raise", unit: str = CALL
    ) -> Call:
        """Submit a call, and return as soon as the controller holds it; it may be sent much later.

        Args:
            path: of the endpoint, "chat/completions" or "completions".
            body: of the request as JSON, without `stream` and `priority`, which the controller
                sets.
            restart: what to do when a stream breaks after part of it was handed over, "raise" or
                "skip"; see `Call`.
            unit: name of the unit that it is a call of, for an estimator or a predictor; calls of
                one unit that overlap in time are one execution of it, and units that overlap went
                side by side.

        Raises:
            DemandError: a path or body that cannot be sent, a run that is finished, a controller
                that is closed, or a unit that was of another kind before.
        """
        if path not in _PATHS:
            raise DemandError(f"path is {path!r}; expected one of {', '.join(_PATHS)}")
        if restart not in get_args(Restart):
            raise DemandError(f"restart is {restart!r}; expected one of {get_args(Restart)}")
        if not isinstance(body, Mapping):
            raise DemandError(
                f"the body is {reprlib.repr(body)}; expected a mapping such as "
                '{"model": "m", "prompt": "..."}'
            )
        own = [name for name in _OWN_FIELDS if name in body]
        if own:
            raise DemandError(f"the body has {own}, which the controller sets; leave them out")
        try:
            sent = json.loads(_as_json({**_USAGE, **body}))
        except (TypeError, ValueError) as error:
            raise DemandError(f"the body cannot be sent as JSON: {error}") from error
        self._calls = [call for call in self._calls if not call.over]
        if not self._calls:
            self._ledger.request(self.job, self._clock())
        call = await self._submit(self, path, sent, restart, unit)
        self._calls.append(call)
        return call

    async def execute(
        self,
        plan: Sequence[Planned],
        path: str = "chat/completions",
        *,
        restart: Restart = "raise",
        parallel_calls: ParallelCalls = "sum",
    ) -> list[Any]:
        """Execute a plan: each unit begins as soon as those it waits for are over.

        For a call (a unit of kind "llm") `Planned.make` gives the body, and the call gives its
        text. For any other unit it gives an awaitable, such as a coroutine; how long that takes is
        counted as service and recorded, as by `record`. Where the units say their seconds, the run
        is told what is left as it begins and at the end of each of them, as by `expect`.

        A unit that fails takes with it those that wait for it, which are not begun; the others go
        on. If the task that awaits this is cancelled, so are the calls.

        Args:
            plan: at least one unit, each after those it waits for.
            path: of the endpoint of all its calls.
            restart: of all its calls, as for `submit`.
            parallel_calls: what is told to be left, the "sum" or the "critical_path".

        Returns:
            What each unit gave, in the order of the plan.

        Raises:
            PlanError: units failed, or what they were to submit was refused; raised when nothing
                is underway any more.
            DemandError: a plan that is none, or seconds beside an estimator, which tells them.
        """
        served = ServedPlan(
            self._ledger.loop.check_plan(plan),
            parallel_calls,
            submit=lambda body, unit: self.submit(path, body, restart, unit),
            record=self.record,
            over=partial(self._ledger.loop.over, self.job),
            expect=self.expect,
        )
        return await served.executed()

    def serve(self, seconds: float) -> None:
        """Count `seconds` of service that the run received elsewhere, such as in a tool.

        Needed where the distributions of total demand include such seconds.

        Raises:
            DemandError: seconds that are no number, negative or not finite, or an estimator (which
                has to know the unit: `record`).
        """
        self._ledger.serve_elsewhere(self.job, seconds, self._clock())

    def record(self, execution: Execution) -> None:
        """Count what the run executed elsewhere, such as a tool, and record its unit.

        Raises:
            DemandError: what is no execution, a unit that was of another kind before, or a run that
                is finished.
        """
        if self.finished:
            raise DemandError("the run is finished; record what it executes before that")
        self._ledger.record(self.job, execution, self._clock())

    def expect(self, remaining: Distribution) -> None:
        """Replace what is known of its demand by `remaining`: the seconds it needs from here on.

        Raises:
            DemandError: something that is no distribution.
        """
        self._ledger.expect(self.job, remaining)

    def learn(self, remaining: Distribution) -> None:
        """The old name of `expect`."""
        warn_renamed_method("Run", "learn", "expect")
        self.expect(remaining)

    def finish(self) -> None:
        """End the run and cancel those of its calls that have not ended. Again has no effect.

        An estimator learns from the run, unless calls had to be cancelled, the last one failed, or
        its `with` block was left by an error.
        """
        self._finish(whole=True)

    def _finish(self, whole: bool) -> None:
        if not self.finished:
            self.finished = True
            live = [call for call in self._calls if not call.over]
            for call in live:
                call.cancel()
            self._ledger.close(self.job, self._clock(), whole and not live)


def _as_json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
