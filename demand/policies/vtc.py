"""Fair sharing by virtual counters."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import final

from typing_extensions import override

from demand.arguments import positive_seconds
from demand.errors import DemandError
from demand.policies.base import Policy, Rank, number
from demand.policies.exact_thresholds import next_quantum_end, whole_quanta
from demand.policies.job import Job


@final
@dataclass(frozen=True)
class VTC(Policy):
    """The tenant that got the least weighted service goes first (VTC, OSDI 2024).

    Each tenant has a counter of the service its jobs received, divided by its weight. A tenant
    that comes back from having nothing to do is lifted to the least counter of those present (to
    that of the last to leave, if there are none), so that idling earns no credit. Jobs of one
    tenant go in order of arrival.

    Departures: service is seconds (cost-model weighted tokens) where the paper counts weighted
    input and output tokens; jobs can be preempted, so that a tenant is present while it has any
    unfinished job, where the paper asks for a waiting request; counters are compared in whole
    quanta, so that tenants do not swap at every instant. Two tenants that both stay present then
    differ in weighted service by a few quanta, whatever their jobs need.

    Args:
        quantum: seconds of weighted service.

    Raises:
        DemandError: a quantum that is not positive and finite; service of negative seconds.
    """

    quantum: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantum", positive_seconds("quantum", self.quantum))

    @property
    @override
    def reranks(self) -> bool:
        """True: serving a job moves all jobs of its tenant back."""
        return True

    @override
    def line(self, job: Job) -> str:
        """The tenant of the job: its jobs go in order of arrival."""
        return job.tenant

    @override
    def new_state(self) -> "VTCState":
        """The counters of all tenants."""
        return VTCState()

    @override
    def rank(self, job: Job, now: float) -> float:
        """Weighted seconds that its tenant received, counted in whole quanta."""
        state = job.state
        if type(state) is not VTCState:  # a call less, where most ranks are asked for
            state = _state(job)
        rank: float = state.ranks[job.tenant]
        return rank

    @override
    def next_above(self, job: Job, threshold: Rank) -> float:
        """Where the counter of its tenant ends a quantum, with all of its running jobs adding."""
        state = job.state if type(job.state) is VTCState else _state(job)
        counter, attained = state.counters[job.tenant], job.attained_service
        end = next_quantum_end(counter, self.quantum, number(threshold, self))
        running = [other.running for other in state.present[job.tenant]].count(True) or 1
        at = attained + (end - counter) * job.weight / running
        return at if at > attained else math.nextafter(attained, math.inf)

    @override
    def arrived(self, job: Job, now: float) -> None:
        """Lift the counter of its tenant, if that had nothing to do."""
        state = _state(job)
        mine = state.present.setdefault(job.tenant, [])
        if not mine:
            others = [state.counters[name] for name, jobs in state.present.items() if jobs]
            floor = min(others) if others else state.counters.get(state.last_to_leave, 0.0)
            self._count(state, job.tenant, max(state.counters[job.tenant], floor))
        mine.append(job)

    @override
    def served(self, job: Job, seconds: float, now: float) -> None:
        """Add the service to the counter of its tenant."""
        if not seconds >= 0.0:
            raise DemandError(
                f"job {job.index} was served for {seconds} seconds; the clock of a scheduler "
                "must not go backwards"
            )
        state = job.state if type(job.state) is VTCState else _state(job)
        self._count(state, job.tenant, state.counters[job.tenant] + seconds / job.weight)

    @override
    def departed(self, job: Job, now: float) -> None:
        """Note the tenant as the last to leave."""
        state = _state(job)
        state.present[job.tenant].remove(job)
        state.last_to_leave = job.tenant

    def _count(self, state: "VTCState", tenant: str, counter: float) -> None:
        state.counters[tenant] = counter
        state.ranks[tenant] = whole_quanta(counter, self.quantum) * self.quantum


@dataclass
class VTCState:
    """What one scheduler remembers of the tenants.

    Attributes:
        counters: weighted seconds that each received.
        ranks: the same in whole quanta.
        present: unfinished jobs of each.
        last_to_leave: whose job finished last.
    """

    counters: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    ranks: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    present: dict[str, list[Job]] = field(default_factory=dict)
    last_to_leave: str = ""


def _state(job: Job) -> VTCState:
    if not isinstance(job.state, VTCState):
        raise DemandError(
            f"job {job.index} of tenant {job.tenant!r} has no counters; a scheduler sets job.state "
            "to one policy.new_state() for all its jobs"
        )
    return job.state
