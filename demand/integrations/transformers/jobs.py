"""Which job each request of an engine belongs to, and what service the jobs have had."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import final

from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.graph.pdgraph import PDGraph
from demand.integrations.job_ledger import Ledger
from demand.policies.base import Job, Policy, Rank
from demand.units import CostModel

CHILD = "__child#"
"""Between the id of a request and the number of a sequence that was forked off it."""

UNANNOUNCED = "unannounced request"
"""Application of the requests that reach the engine without having been announced."""


@dataclass(slots=True, eq=False)
class _Entry:
    job: Job
    tokens: dict[str, tuple[int, int]] = field(default_factory=dict)  # prefilled, generated
    live: set[str] = field(default_factory=set)
    seconds_outside: float = 0.0
    closed: bool = False


@final
class JobTable:
    """The jobs in an engine, their requests, and the order they are served in.

    A job is one application from its arrival to its end. It is opened, makes any number of
    requests, side by side or one after another, and is closed; it departs with its last request.
    Attained service is the cost model's seconds of the prompt tokens prefilled and the tokens
    generated, over all its requests; what is computed again after an eviction counts once. An
    application that has no distribution is ranked by attained service, and a warning says so.

    Safe to use from several threads.

    Args:
        policy: ranks the jobs.
        distributions: of total demand in seconds, by application name.
        graphs: of the applications whose distribution is to be `graph.remaining()`.
        cost: seconds of tokens; `None` takes that of the graphs, or the default without graphs.
        clock: gives seconds; `now()` counts them from the making of the table.
        seed: of the numbers that jobs draw (`Job.lottery`) and of the graphs' walks.

    Raises:
        DemandError: something that is no policy, an application given twice, or cost models that
            differ.
    """

    def __init__(
        self,
        policy: Policy,
        distributions: Mapping[str, Distribution] | None = None,
        graphs: Mapping[str, PDGraph] | None = None,
        cost: CostModel | None = None,
        clock: Callable[[], float] = time.monotonic,
        seed: int = 0,
    ) -> None:
        known, graphs = {**(distributions or {})}, {**(graphs or {})}
        if twice := sorted(known.keys() & graphs.keys()):
            raise DemandError(
                f"applications {twice} have a distribution and a graph; give one of them"
            )
        costs = {graph.cost for graph in graphs.values()} | ({cost} if cost else set())
        if len(costs) > 1:
            raise DemandError(
                f"cost models differ: {sorted(map(repr, costs))}; attained service and demand must "
                "be the same seconds: fit every graph with the cost model of the table"
            )
        self.cost = costs.pop() if costs else CostModel()
        known |= {name: graph.remaining(seed=seed) for name, graph in graphs.items()}
        self._ledger = Ledger(policy, known, seed)
        self._clock, self._origin = clock, clock()
        self._lock = threading.RLock()
        self._entries: dict[int, _Entry] = {}
        self._requests: dict[str, _Entry] = {}

    @property
    def policy(self) -> Policy:
        """What ranks the jobs."""
        return self._ledger.policy

    def now(self) -> float:
        """Seconds since the table was made."""
        return self._clock() - self._origin

    def open(
        self,
        application: str,
        *,
        deadline_seconds: float = math.inf,
        tenant: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        demand_seconds: float = math.nan,
    ) -> Job:
        """Let an application arrive.

        Args:
            application: its name, by which its distribution is found.
            deadline_seconds: from now, by when it should be finished; infinity for none.
            tenant: who pays for it; `None` makes the application the tenant.
            weight: share of the tenant relative to the others.
            priority: class that a priority policy serves by, smaller first.
            demand_seconds: its true total demand, for an oracle.

        Raises:
            DemandError: as for `Ledger.open`: values that make no sense, or a job that the policy
                cannot rank, such as one of unknown demand under an oracle.
        """
        with self._lock:
            job = self._ledger.open(
                application,
                self.now(),
                deadline_seconds=deadline_seconds,
                tenant=tenant,
                weight=weight,
                priority=priority,
                demand_seconds=demand_seconds,
            )
            self._entries[job.index] = _Entry(job)
            return job

    def announce(self, job: Job, request_id: str) -> None:
        """Say that `job` makes a request of this id, before the engine is given it.

        Raises:
            DemandError: a job that is closed or not in the table, or an id that is in use or
                would be taken for a forked sequence.
        """
        with self._lock:
            entry = self._entry(job)
            if entry.closed:
                raise DemandError(
                    f"job {job.index} of {job.application!r} is closed and makes another request; "
                    "close it after its last one"
                )
            if request_id in self._requests or CHILD in request_id:
                raise DemandError(
                    f"request id {request_id!r} is in use or contains {CHILD!r}, which marks "
                    "forked sequences; choose another"
                )
            self._requests[request_id] = entry
            entry.live.add(request_id)
            self._ledger.request(job, self.now())

    def close(self, job: Job) -> None:
        """Say that `job` makes no further request."""
        with self._lock:
            entry = self._entry(job)
            entry.closed = True
            self._depart_if_done(entry)

    def learn(self, job: Job, remaining: Distribution) -> None:
        """Take in what is now known of the seconds that `job` still needs.

        For instance between two stages of an agent, from `graph.remaining(progress)`.
        """
        with self._lock:
            self._ledger.learn(self._entry(job).job, remaining)

    def serve(self, job: Job, seconds: float) -> None:
        """Count service that `job` had outside the engine, where demands count it: a tool's.

        Raises:
            DemandError: seconds that are negative or not finite.
        """
        with self._lock:
            entry = self._entry(job)
            self._ledger.serve(job, seconds, self.now())
            entry.seconds_outside += seconds

    # What follows is for the scheduler of the engine.

    def entered(self, request_id: str) -> None:
        """Note that the engine has a request; one that nobody announced is a job of its own."""
        with self._lock:
            base = base_id(request_id)
            if base not in self._requests:
                job = self.open(UNANNOUNCED)
                self.announce(job, base)
                self.close(job)

    def progressed(self, request_id: str, prefilled_tokens: int, generated_tokens: int) -> None:
        """Bring the service of a request's job up to date; counts of tokens never fall."""
        with self._lock:
            entry = self._requests.get(base_id(request_id))
            if entry is None:  # failed, and forgotten by who read that
                return
            before = entry.tokens.get(request_id, (0, 0))
            after = max(before[0], prefilled_tokens), max(before[1], generated_tokens)
            if after == before:
                return
            entry.tokens[request_id] = after
            # From whole tokens, so that sums of steps do not drift off the atoms of a demand.
            attained = (
                sum(prefilled for prefilled, _ in entry.tokens.values())
                * self.cost.prefill_seconds_per_token
                + sum(generated for _, generated in entry.tokens.values())
                * self.cost.decode_seconds_per_token
                + entry.seconds_outside
            )
            job = entry.job
            self._ledger.serve(job, max(attained - job.attained_service, 0.0), self.now())
            job.attained_service = attained

    def ranked(self, request_ids: Iterable[str]) -> list[str]:
        """The ids, best first. Ties go to the earlier job, then as the ids came.

        Raises:
            DemandError: a policy that ranks NaN.
        """
        with self._lock:
            now = self.now()
            places: dict[int, tuple[Rank, int]] = {}
            keys: dict[str, tuple[Rank, int]] = {}
            for request_id in request_ids:
                job = self._requests[base_id(request_id)].job
                if job.index not in places:
                    places[job.index] = (self._ledger.rank(job, now), job.index)
                keys[request_id] = places[job.index]
            return sorted(keys, key=keys.__getitem__)

    def runs(self, request_ids: Iterable[str]) -> None:
        """Note which requests are in the batch."""
        with self._lock:
            running = {self._requests[base_id(request_id)].job.index for request_id in request_ids}
            for index, entry in self._entries.items():
                (self._ledger.start if index in running else self._ledger.stop)(entry.job)

    def ended(self, request_id: str) -> None:
        """Forget a request that finished, failed or was cancelled; again is as good as once."""
        with self._lock:
            entry = self._requests.pop(request_id, None)
            if entry is not None:
                entry.live.discard(request_id)
                self._depart_if_done(entry)

    def __len__(self) -> int:
        """Jobs in the table."""
        return len(self._entries)

    def __repr__(self) -> str:
        return f"JobTable({self.policy!r}, {len(self)} jobs, {len(self._requests)} requests)"

    def _entry(self, job: Job) -> _Entry:
        entry = self._entries.get(job.index)
        if entry is None or entry.job is not job:
            raise DemandError(
                f"job {job.index} of {job.application!r} is not in this table; it has departed, or "
                "another table opened it: open a new one"
            )
        return entry

    def _depart_if_done(self, entry: _Entry) -> None:
        if entry.closed and not entry.live:
            del self._entries[entry.job.index]
            self._ledger.close(entry.job, self.now())


def base_id(request_id: str) -> str:
    """The id that was submitted, of a request or of a sequence forked off it."""
    return request_id.split(CHILD, 1)[0]
