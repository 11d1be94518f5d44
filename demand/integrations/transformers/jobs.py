"""The jobs in an engine of transformers: the requests and the attained service of each."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Unpack, final

from demand.arguments import (
    check_callable,
    check_instance,
    warn_renamed_method,
    whole_number,
)
from demand.dependencies import After
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.graph.pdgraph import PDGraph
from demand.integrations.job_ledger import JobDetails, JobLedger
from demand.integrations.learning import CALL
from demand.integrations.plans import Planned
from demand.policies.base import Policy, Rank
from demand.policies.job import Job
from demand.refine.estimator import DemandEstimator
from demand.refine.predictor import Predictor
from demand.seconds import check_seconds
from demand.units import CostModel, Execution

CHILD = "__child#"
"""Stands between the id of a request and the number of a sequence forked off it."""

UNANNOUNCED = "unannounced request"
"""Name of the application of requests that reach the engine without being announced."""


@dataclass(slots=True, eq=False)
class _Entry:
    """What the table keeps of one job.

    Attributes:
        job: as the policy sees it.
        tokens: of each request or forked sequence, how many were prefilled and generated.
        live: ids of its requests that have not ended.
        seconds_outside: service it had outside the engine.
        closed: whether it makes no further request.
    """

    job: Job
    tokens: dict[str, tuple[int, int]] = field(default_factory=dict)
    live: set[str] = field(default_factory=set)
    seconds_outside: float = 0.0
    closed: bool = False


@final
class JobTable:
    """The jobs in an engine of transformers, their requests, and the order to serve them in.

    A job is one run of an application, from its arrival to its end. It is opened, makes any number
    of requests, side by side or one after another, and is closed; it departs when it is closed and
    its last request has ended. Its attained service is the cost model's seconds of all prompt
    tokens prefilled and all tokens generated, over all its requests; tokens that are computed
    again after an eviction count once. Jobs of an application without a distribution are ranked by
    attained service, and a warning names it.

    Safe to use from several threads.

    Args:
        policy: ranks the jobs.
        distributions: of total demand in seconds, by name of the application.
        graphs: demand graphs by name of the application; its distribution is `graph.remaining()`.
        cost: seconds of service that a token stands for; `None` takes that of the graphs, or
            `CostModel()` without graphs.
        clock: gives seconds; `now()` counts them from the making of the table.
        seed: of the random numbers that jobs draw (`Job.lottery`), and of the graphs' walks.
        estimator: in place of distributions and graphs: says what is known of a job as it arrives
            and what is left of it at the end of each request, and learns from the jobs that end.
            From here on it belongs to the table.
        predictor: says what is left of a job as it makes a request, before the first token.

    Raises:
        DemandError: an argument of the wrong kind, such as the class of a policy, an application
            that has both a distribution and a graph, either beside an estimator, an estimator that
            counts the critical path, or cost models that differ.
    """

    def __init__(
        self,
        policy: Policy,
        distributions: Mapping[str, Distribution] | None = None,
        graphs: Mapping[str, PDGraph] | None = None,
        cost: CostModel | None = None,
        clock: Callable[[], float] = time.monotonic,
        seed: int = 0,
        *,
        estimator: DemandEstimator | None = None,
        predictor: Predictor | None = None,
    ) -> None:
        example = 'a mapping from names, such as {"report": ...}, or None'
        for name, given in (("distributions", distributions), ("graphs", graphs)):
            check_instance(name, {} if given is None else given, Mapping, example)
        known, graphs = {**(distributions or {})}, {**(graphs or {})}
        for application, graph in graphs.items():
            check_instance(f"graph of {application!r}", graph, PDGraph, "a graph of PDGraph.fit")
        if cost is not None:
            check_instance("cost", cost, CostModel, "a CostModel, or None")
        check_callable("clock", clock, "a function that gives seconds, such as time.monotonic")
        seed = whole_number("seed", seed)
        if twice := sorted(known.keys() & graphs.keys()):
            raise DemandError(
                f"applications {twice} have a distribution and a graph; give one of them"
            )
        costs = {graph.cost for graph in graphs.values()} | (set() if cost is None else {cost})
        if len(costs) > 1:
            raise DemandError(
                f"cost models differ: {sorted(map(repr, costs))}; attained service and demand must "
                "be the same seconds: fit every graph with the cost model of the table"
            )
        known |= {name: graph.remaining(seed=seed) for name, graph in graphs.items()}
        self._ledger = JobLedger(
            policy,
            known,
            seed,
            estimator=estimator,
            predictor=predictor,
            cost=costs.pop() if costs else None,
        )
        self.cost = self._ledger.cost
        self._clock, self._origin = clock, clock()
        self._lock = threading.RLock()
        self._entries: dict[int, _Entry] = {}
        self._requests: dict[str, _Entry] = {}

    @property
    def policy(self) -> Policy:
        """The policy that ranks the jobs."""
        return self._ledger.policy

    def now(self) -> float:
        """Seconds since the table was made."""
        return self._clock() - self._origin

    def open(self, application: str, **details: Unpack[JobDetails]) -> Job:
        """Open a job: a run of `application` arrives now.

        Args:
            application: its name, by which its distribution is found.
            details: of the job, any of `deadline_seconds` (from now on), `tenant`, `weight`,
                `priority` and `demand_seconds`; see `JobDetails`.

        Raises:
            DemandError: a value of the wrong kind or out of range, or a job that the policy cannot
                rank, such as one of unknown demand under an oracle.
        """
        with self._lock:
            job = self._ledger.open(application, self.now(), **details)
            self._entries[job.index] = _Entry(job)
            return job

    def announce(
        self, job: Job, request_id: str, unit: str = CALL, prompt: Sequence[int] | None = None
    ) -> None:
        """Say that `job` makes a request of this id, before the engine is given it.

        Args:
            job: whose it is.
            request_id: that the engine will be given.
            unit: name of the unit that it is a call of, for an estimator or a predictor; requests
                of one unit that overlap in time are one execution of it, and units that overlap
                went side by side.
            prompt: ids of its tokens, for a predictor.

        Raises:
            DemandError: a job that is closed or not in the table, an id that is in use or would be
                taken for a forked sequence, or a unit that was of another kind before.
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
            tokens = None if prompt is None else len(prompt)
            self._ledger.loop.begin(job, request_id, unit, tokens, prompt)
            self._submitted(entry, request_id)

    def close(self, job: Job) -> None:
        """Close `job`: it makes no further request, and departs once its last one has ended.

        Raises:
            DemandError: a job that has departed, or that another table opened.
        """
        with self._lock:
            entry = self._entry(job)
            entry.closed = True
            self._depart_if_done(entry)

    def expect(self, job: Job, remaining: Distribution) -> None:
        """Replace what is known of the demand of `job` by `remaining`: the seconds it still needs.

        For instance between two stages of an agent, by `graph.remaining(progress)`.

        Raises:
            DemandError: something that is no distribution, a job that has departed, or one that
                another table opened.
        """
        with self._lock:
            self._ledger.expect(self._entry(job).job, remaining)

    def learn(self, job: Job, remaining: Distribution) -> None:
        """The old name of `expect`."""
        warn_renamed_method("JobTable", "learn", "expect")
        self.expect(job, remaining)

    def serve(self, job: Job, seconds: float) -> None:
        """Count `seconds` of service that `job` received outside the engine, such as in a tool.

        Needed where the distributions of total demand include such seconds.

        Raises:
            DemandError: seconds that are no number, negative or not finite, an estimator (which
                has to know the unit: `record`), a job that has departed, or one that another table
                opened.
        """
        with self._lock:
            entry = self._entry(job)
            seconds = check_seconds("service", seconds)
            self._ledger.serve_elsewhere(job, seconds, self.now())
            entry.seconds_outside += seconds

    def record(self, job: Job, execution: Execution) -> None:
        """Count what `job` executed outside the engine, such as a tool, and record its unit.

        Raises:
            DemandError: what is no execution, a unit that was of another kind before, a job that
                has departed, or one that another table opened.
        """
        with self._lock:
            entry = self._entry(job)
            before = job.attained_service
            self._ledger.record(job, execution, self.now())
            entry.seconds_outside += job.attained_service - before

    def received(self, job: Job, request_id: str) -> float:
        """Seconds of service that a request of `job` has had so far, its forked sequences included.

        Raises:
            DemandError: a job that has departed, or that another table opened.
        """
        with self._lock:
            counts = [
                tokens
                for one, tokens in self._entry(job).tokens.items()
                if base_id(one) == request_id
            ]
        return (
            sum(read for read, _ in counts) * self.cost.prefill_seconds_per_token
            + sum(made for _, made in counts) * self.cost.decode_seconds_per_token
        )

    def over(self, job: Job) -> After:
        """What of the run of `job` a unit that begins now waited for, as `Execution.after`.

        Of those that are over, the ones for which no other has waited; `None` without an estimator
        and a predictor, when nobody records it.
        """
        with self._lock:
            return self._ledger.loop.over(self._entry(job).job)

    def check_plan(self, plan: Sequence[Planned]) -> tuple[Planned, ...]:
        """`plan`, refused if it tells what is left of a job where the estimator does that.

        Raises:
            DemandError: it does, or it is no list of units of a plan.
        """
        return self._ledger.loop.check_plan(plan)

    # What follows is for the scheduler of the engine.

    def entered(self, request_id: str) -> None:
        """Note that a request is in the engine; one that was not announced is a job of its own.

        A predictor is not asked about it: nobody could be told if it failed.
        """
        with self._lock:
            base = base_id(request_id)
            if base not in self._requests:
                job = self.open(UNANNOUNCED)
                self._ledger.loop.enter(job, base, CALL)
                self._submitted(self._entry(job), base)
                self.close(job)

    def progressed(self, request_id: str, prefilled_tokens: int, generated_tokens: int) -> None:
        """Bring the attained service of a request's job up to date.

        Args:
            request_id: of the request, or of a sequence forked off it.
            prefilled_tokens: of its prompt so far.
            generated_tokens: so far. Neither count falls: after an eviction, which makes the
                engine start over, the largest counts so far hold.
        """
        with self._lock:
            entry = self._requests.get(base_id(request_id))
            if entry is None:  # it failed, and was forgotten when its failure was read
                return
            before = entry.tokens.get(request_id, (0, 0))
            after = max(before[0], prefilled_tokens), max(before[1], generated_tokens)
            if after == before:
                return
            entry.tokens[request_id] = after
            self._ledger.loop.count(entry.job, base_id(request_id), *after, request_id)
            # From the token counts, not by adding up steps: rounding errors would move the sum
            # away from the values of the demand's distribution.
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
        """Put requests in the order to serve them, best first.

        Requests of equal rank go by the arrival of their jobs, then as they were given.

        Raises:
            DemandError: a policy that gives no rank: NaN, or what is no number at all.
        """
        with self._lock:
            now = self.now()
            keys_of_jobs: dict[int, tuple[Rank, int]] = {}
            keys: dict[str, tuple[Rank, int]] = {}
            for request_id in request_ids:
                job = self._requests[base_id(request_id)].job
                if job.index not in keys_of_jobs:
                    keys_of_jobs[job.index] = (self._ledger.rank(job, now), job.index)
                keys[request_id] = keys_of_jobs[job.index]
            return sorted(keys, key=keys.__getitem__)

    def runs(self, request_ids: Iterable[str]) -> None:
        """Note which requests are in the present batch: their jobs are being served."""
        with self._lock:
            running = {self._requests[base_id(request_id)].job.index for request_id in request_ids}
            for index, entry in self._entries.items():
                (self._ledger.start if index in running else self._ledger.stop)(entry.job)

    def ended(self, request_id: str, finished: bool = False) -> None:
        """Forget a request that has ended. Again has no effect.

        Args:
            request_id: of the request.
            finished: whether it got all its tokens, and did not fail and was not cancelled.
        """
        with self._lock:
            entry = self._requests.pop(request_id, None)
            if entry is not None:
                entry.live.discard(request_id)
                self._ledger.loop.end(entry.job, request_id, finished)
                self._depart_if_done(entry)

    def __len__(self) -> int:
        """Number of jobs in the table."""
        return len(self._entries)

    def __repr__(self) -> str:
        return f"JobTable({self.policy!r}, {len(self)} jobs, {len(self._requests)} requests)"

    def _submitted(self, entry: _Entry, request_id: str) -> None:
        if not entry.live:  # else the job has waited since it made the others
            self._ledger.request(entry.job, self.now())
        self._requests[request_id] = entry
        entry.live.add(request_id)

    def _entry(self, job: Job) -> _Entry:
        check_instance("job", job, Job, "a job that `open` gave")
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
    """The id of the request that was submitted, given its own or that of a forked sequence."""
    return request_id.split(CHILD, 1)[0]
