"""The requests in an engine, ranked by the runs they belong to; knows nothing of the engine."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from demand.arguments import whole_number
from demand.errors import DemandError
from demand.integrations.job_ledger import JobLedger, TokenMeter
from demand.integrations.vllm.annotation import Annotation
from demand.integrations.vllm.displacement import Key
from demand.policies.job import Job
from demand.units import CostModel, Unit

logger = logging.getLogger(__name__)

RunName = tuple[str, str]
"""Application and run, as annotated."""


@dataclass(slots=True)
class _Run:
    """A run with requests in the engine, or remembered from those it had.

    Attributes:
        job: what the policy sees of it.
        requests: ids of its requests in the engine.
        last: whether its last request has come.
    """

    job: Job
    requests: set[str] = field(default_factory=set)
    last: bool = False


@dataclass(slots=True)
class _Request:
    name: RunName
    run: _Run
    meter: TokenMeter


@final
class Ranking:
    """Ranks the requests in an engine by the service that the runs they belong to have attained.

    Args:
        ledger: opens and ranks the jobs, one for each run.
        cost: seconds of service that a token stands for.
        idle_runs: how many runs are remembered that have no request in the engine and have not
            been marked as over; beyond that number the one idle for longest is forgotten.

    Raises:
        DemandError: `idle_runs` that is no whole number from 0 on.
    """

    def __init__(self, ledger: JobLedger, cost: CostModel, idle_runs: int) -> None:
        self._ledger = ledger
        self._cost = cost
        self._idle_runs = whole_number("idle_runs", idle_runs, least=0)
        self._runs: dict[RunName, _Run] = {}
        self._idle: dict[RunName, _Run] = {}  # a subset, idle for longest first
        self._running: dict[RunName, _Run] = {}
        self._requests: dict[str, _Request] = {}
        self._told: dict[RunName, _Run] = {}  # whose rest was told anew since keys were given

    def add(
        self,
        request: str,
        fields: Mapping[str, Any],
        now: float,
        prompt: Sequence[int] | None = None,
    ) -> Key:
        """Take in a request, and give the key by which it is sorted.

        If its annotation is wrong, that is logged and the request is served as unannotated: an
        engine has others to serve, and no way to refuse one at this point. An oracle ranks a
        request without `demand_seconds` last. A predictor that fails is logged as well, and the
        request is served without its prediction.

        Args:
            request: its id, unique in the engine.
            fields: what came with it, `annotation` among other things.
            now: second on the engine's clock.
            prompt: ids of its tokens, for a predictor; `None` where the engine has none.
        """
        input_tokens = None if prompt is None else len(prompt)
        try:
            annotation = Annotation.of(fields)
            made_of = Unit(annotation.unit, "llm")
            self._ledger.loop.check_unit(annotation.application, made_of)
            name, run = self._run_of(request, annotation, now)
        except DemandError as error:
            logger.warning("request %s is served as unannotated: %s", request, error)
            annotation = Annotation()
            name, run = self._run_of(request, annotation, now)
        try:
            self._ledger.loop.foresee(run.job, annotation.unit, input_tokens, prompt)
        except Exception:  # of any kind: predictors are the user's
            logger.exception("request %s is served without a prediction", request)
        self._ledger.loop.enter(run.job, request, annotation.unit)
        if self._ledger.loop.active:
            self._told[name] = run
        if not run.requests:
            self._ledger.request(run.job, now)
        run.requests.add(request)
        run.last = run.last or annotation.last or not annotation.run
        self._idle.pop(name, None)
        self._requests[request] = _Request(name, run, TokenMeter(self._cost))
        return self.key(request, now)

    def key(self, request: str, now: float) -> Key:
        """The key that `request` is sorted by at second `now`, smallest first."""
        job = self._requests[request].run.job
        return self._ledger.rank(job, now), job.index

    def serve(self, progress: Iterable[tuple[str, int, int]], now: float) -> set[str]:
        """Count the service of the requests that are being served.

        Args:
            progress: of each, its id, input tokens read and output tokens generated.
            now: second on the engine's clock.

        Returns:
            Ids of the requests whose keys may have changed: those of all runs that are served or
            were served until now, or were told of their rest; or every request if serving one run
            can change the rank of others (`Policy.reranks`).
        """
        served: dict[RunName, _Run] = {}
        for request, input_tokens, output_tokens in progress:
            entry = self._requests[request]
            self._ledger.start(entry.run.job)
            gained = entry.meter.gained(input_tokens, output_tokens)
            self._ledger.serve(entry.run.job, gained, now)
            self._ledger.loop.count(entry.run.job, request, input_tokens, output_tokens)
            served[entry.name] = entry.run
        stopped = {name: run for name, run in self._running.items() if name not in served}
        for run in stopped.values():
            self._ledger.stop(run.job)
        self._running = served
        if self._ledger.policy.reranks:
            self._told = {}
            return set(self._requests)
        changed = {**self._told, **stopped, **served}.values()
        self._told = {}
        return {request for run in changed for request in run.requests}

    def finish(
        self, request: str, input_tokens: int, output_tokens: int, now: float, whole: bool = True
    ) -> None:
        """Note that `request` has left the engine, with this many tokens read and generated.

        Args:
            request: its id.
            input_tokens: read.
            output_tokens: generated.
            now: second on the engine's clock.
            whole: whether it finished, and was not aborted.
        """
        entry = self._requests.pop(request)
        run = entry.run
        self._ledger.serve(run.job, entry.meter.gained(input_tokens, output_tokens), now)
        self._ledger.loop.count(run.job, request, input_tokens, output_tokens)
        self._ledger.loop.end(run.job, request, whole)
        if self._ledger.loop.active:
            self._told[entry.name] = run
        run.requests.remove(request)
        if run.requests:
            return
        if run.last:
            self._close(entry.name, now, whole=True)
            return
        self._ledger.stop(run.job)
        self._idle[entry.name] = run
        if len(self._idle) > self._idle_runs:
            forgotten = next(iter(self._idle))
            del self._idle[forgotten]
            self._close(forgotten, now, whole=False)  # nobody said that it was over

    def _close(self, name: RunName, now: float, whole: bool) -> None:
        self._told.pop(name, None)
        self._ledger.close(self._runs.pop(name).job, now, whole)

    def _run_of(self, request: str, annotation: Annotation, now: float) -> tuple[RunName, _Run]:
        # No application is named "", so a request that is a run of its own shares no name.
        name = (annotation.application, annotation.run) if annotation.run else ("", request)
        run = self._runs.get(name)
        if run is None:
            details = {"demand_seconds": math.inf, **annotation.details}
            run = _Run(self._ledger.open(annotation.application, now, **details))
            self._runs[name] = run
        return name, run
