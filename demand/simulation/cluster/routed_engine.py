"""An engine behind a router: what was routed to it, and what the router sees of it."""

from typing import final

from demand.routing.base import ReadyUnit
from demand.simulation.cluster.result import EngineShare
from demand.simulation.engine.engine_at_work import EngineAtWork
from demand.simulation.engine.job_on_engine import JobOnEngine
from demand.simulation.engine.result import Prefixes
from demand.workloads.workload import Workload


@final
class RoutedEngine:
    """A `SeenEngine` as of second `now`, and what is routed to it.

    Args:
        number: from 0 on.
        work: the engine.

    Attributes:
        number: as given.
        work: as given.
        now: second at which a router looks at it.
        units: that were routed here.
    """

    def __init__(self, number: int, work: EngineAtWork) -> None:
        self.number = number
        self.work = work
        self.now = 0.0
        self.units = 0
        self._requests = 0
        self._prompt_tokens = 0

    @property
    def requests(self) -> int:
        """Requests that were routed here and are not over."""
        return self._requests - self.work.batch.over

    @property
    def waiting(self) -> int:
        """Of those, requests that hold no KV on the device."""
        return self.requests - self.work.batch.blocks.holders

    @property
    def prompt_tokens(self) -> int:
        """Tokens of their prompts that have never been computed or found."""
        return self._prompt_tokens - self.work.batch.prompt_tokens

    @property
    def kv_share(self) -> float:
        """Share of the blocks that requests hold."""
        return self.work.blocks_held(self.now) / self.work.batch.engine.blocks

    def found_tokens(self, unit: ReadyUnit) -> int:
        """Prompt tokens of `unit`, over its calls, that would be found here if it began now."""
        job, cache = unit.job, self.work.cache
        assert isinstance(job, JobOnEngine)
        if cache is None or not cache.found_tokens(job):
            return 0
        self.work.cut(self.now)  # some of it may have been given up in the steps since
        return cache.found_tokens(job)

    def route(self, unit: ReadyUnit) -> None:
        """`unit` is routed here."""
        self.units += 1
        self._requests += unit.requests
        self._prompt_tokens += unit.prompt_tokens

    def ask(self, job: JobOnEngine) -> None:
        """The calls of the present unit of `job` are asked of this engine."""
        if self.work.cache is not None:
            self.work.cut(self.now)
            self.work.cache.ask(job, self.now)

    def ask_elsewhere(self, job: JobOnEngine) -> None:
        """The calls of the present unit of `job` are asked of another engine."""
        cache = self.work.cache
        if cache is not None and cache.knows(job):
            self.work.cut(self.now)
            cache.ask_elsewhere(job)

    def end(self, job: JobOnEngine, now: float) -> None:
        """The run of `job` is over."""
        cache = self.work.cache
        if cache is not None and cache.knows(job):
            self.work.cut(now)
            cache.end(job)

    def share(self, workload: Workload) -> EngineShare:
        """What it has done for `workload`, in order of arrival."""
        work, batch, cache = self.work, self.work.batch, self.work.cache
        return EngineShare(
            self.number,
            self.units,
            work.steps,
            work.decisions,
            work.busy_seconds,
            batch.requests / max(work.steps, 1),
            work.batcher.preemptions,
            batch.blocks.prefilled_again,
            batch.blocks.swapped,
            batch.blocks.peak,
            work.served(workload.applications),
            Prefixes() if cache is None else cache.report(),
        )
