"""Chunks that the demand graph says will be needed next are brought from disk to memory."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from serving.knowledge import Knowledge
from serving.loop import Running

from demand import CallbackBackend, CostModel, Prewarming, PrewarmPlanner
from picache import CorruptChunk


class ChunkPrewarming:
    """Plans as a unit starts, prefetches in a thread of its own while the model writes.

    A store finds room for what is prefetched by itself, so that nothing is to be released.

    Args:
        knowledge: its graphs say which unit follows and when.
        prefetch: brings the chunk of a document to memory and says whether it did, as
            `ModelServer.prefetch`.
        warm_seconds: that the chunks of a call take.
        planner: says when to start.

    Attributes:
        begun: prefetches that were started, one for a unit.
        brought: chunks that came from disk.
        damaged: chunks that were found damaged, and are compiled when they are linked.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        prefetch: Callable[[str], bool],
        warm_seconds: float,
        planner: PrewarmPlanner | None = None,
    ) -> None:
        self._prefetch = prefetch
        self._backend = CallbackBackend(warm_seconds, self._warm)
        pace: CostModel = knowledge.cost
        self._driver = Prewarming(
            planner or PrewarmPlanner(), knowledge.graphs, {"llm": self._backend}, pace
        )
        self._likely: dict[str, tuple[str, ...]] = {}
        self._executor = ThreadPoolExecutor(1, "prefetch")
        self._futures: list[Future[bool]] = []
        self.begun = self.brought = self.damaged = 0
        self._graphs = knowledge.graphs

    def started(self, running: Running, now: float) -> None:
        """A unit begins: plan for what may follow."""
        call = running.call
        assert call is not None
        job, application = str(running.job.index), running.task.application
        self._likely[job] = call.likely
        if call.unit in {unit.name for unit in self._graphs[application].units}:
            self._driver.unit_started(job, application, call.unit, now)
            self._driver.tick(now)

    def at_token(self, now: float) -> None:
        """Start what is due."""
        self._driver.tick(now)

    def finished(self, running: Running, following: str) -> None:
        """A unit is over, and another follows, or "end"."""
        self._driver.unit_finished(str(running.job.index), following)

    def close(self) -> None:
        """Wait for what was begun; count it.

        Raises:
            Exception: what a prefetch raised, other than a chunk that is damaged.
        """
        self._executor.shutdown()
        for future in self._futures:
            try:
                self.brought += future.result()
            except CorruptChunk:
                self.damaged += 1

    def _warm(self, job: str, unit: str) -> None:
        self.begun += 1
        for document in self._likely[job]:
            self._futures.append(self._executor.submit(self._prefetch, document))
