"""Queues of growing quanta, with promotion of jobs that starve."""

import math
from dataclasses import dataclass, field
from typing import final

from typing_extensions import override

from demand.arguments import positive_number, positive_seconds, set_whole_numbers
from demand.errors import DemandError
from demand.policies.base import Rank
from demand.policies.exact_thresholds import ROUNDING
from demand.policies.job import Job
from demand.policies.wrapper import ByClass


@final
@dataclass(frozen=True)
class MLFQ(ByClass):
    """Multi-level feedback queue with promotion (FastServe, arXiv 2305.05920, section 4.1).

    A job joins the first queue. In queue l it may be served for `quantum * ratio ** l` seconds,
    then it goes to the end of the next; the last has no quantum. The first queue that is not empty
    is served, in order of arrival at it. A job that has waited for `starvation_seconds` is promoted
    to the first queue, with a quantum anew. It waits from the end of its last service on, or from
    its present request, if that came later: time away, in a tool or with its user, is no wait.

    Departures: FastServe puts a job into the queue whose quantum covers its prefill ("skip-join"),
    and lets it skip queues whose quantum is less than an iteration; nothing here knows of prefill
    or iterations, jobs are whole applications, and all join the first queue. Promotion is noticed
    as the scheduler looks at a job: a queue's simulator does so at that very second, an engine at
    the beginning of a step.

    Ranks are tuples: the number of the queue, and the second of arrival at it.

    Args:
        quantum: seconds of service in the first queue.
        ratio: of the quantum of a queue to that of the one before; 2 in the paper.
        queues: how many; with one, it is first come, first served.
        starvation_seconds: of waiting, after which a job is promoted; infinity for never.

    Raises:
        DemandError: a quantum or starvation that is not positive, a ratio below 1, or no queue.
    """

    quantum: float = 1.0
    ratio: float = 2.0
    queues: int = 8
    starvation_seconds: float = math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantum", positive_seconds("quantum", self.quantum))
        object.__setattr__(self, "ratio", positive_number("ratio", self.ratio))
        set_whole_numbers(self, "queues", least=1)
        if self.starvation_seconds != math.inf:
            seconds = positive_seconds("starvation_seconds", self.starvation_seconds)
            object.__setattr__(self, "starvation_seconds", seconds)
        if self.ratio < 1.0:
            raise DemandError(f"ratio is {self.ratio}; expected at least 1, such as 2")

    @property
    @override
    def by_request(self) -> bool:
        """Whether jobs that wait are promoted, which wait from their present request on."""
        return self.starvation_seconds < math.inf

    @property
    @override
    def reranks(self) -> bool:
        """Whether jobs that wait are promoted."""
        return self.starvation_seconds < math.inf

    @property
    @override
    def by_clock(self) -> bool:
        """A job arrives at its queue when its quantum ends."""
        return True

    @override
    def new_state(self) -> "QueuesState":
        """Where all jobs of one scheduler stand."""
        return QueuesState()

    @override
    def rank(self, job: Job, now: float) -> tuple[float, ...]:
        """(number of its queue, second of arrival at it)."""
        place = self._place(job)
        if not job.running:
            since = place.waits_since
            place.starving = now - since >= self.starvation_seconds * (1.0 - ROUNDING)
            place.promoted_at = since + self.starvation_seconds
        if place.starving:
            return (0.0, place.promoted_at)
        return (float(place.queue), place.joined_at)

    @override
    def next_above(self, job: Job, threshold: Rank) -> float:
        """The end of its quantum, or where another may be promoted by then."""
        place = self._place(job)
        left = self._quantum_of(0 if place.starving else place.queue)
        left -= 0.0 if place.starving else place.used
        if self.starvation_seconds < math.inf:
            state = _state(job)
            due = [
                other.waits_since + self.starvation_seconds - state.now
                for other in state.places.values()
                if other is not place and not other.starving
            ]
            left = min([left, *(seconds for seconds in due if seconds > 0.0)])
        if left == math.inf:
            return math.inf
        return max(job.attained_service + left, math.nextafter(job.attained_service, math.inf))

    @override
    def arrived(self, job: Job, now: float) -> None:
        """Let it join the first queue."""
        state = _state(job)
        state.now = now
        state.places[job.index] = Place(job, now, now)

    @override
    def served(self, job: Job, seconds: float, now: float) -> None:
        """Count its service, and let it go to the next queue at the end of its quantum.

        Within a piece seconds of service are taken for seconds on the clock. That is exact in a
        queue of servers, and on an engine, which tells of each step, wrong by less than a step and
        its service.
        """
        state, place = _state(job), self._place(job)
        state.now = now
        if place.starving:
            place.queue, place.joined_at = 0, place.promoted_at
            place.used, place.starving = 0.0, False
        place.served_at = now
        place.used += seconds
        while place.used >= (quantum := self._quantum_of(place.queue)) * (1.0 - ROUNDING):
            place.used = max(place.used - quantum, 0.0)
            place.queue, place.joined_at = place.queue + 1, now - place.used

    @override
    def departed(self, job: Job, now: float) -> None:
        """Forget it."""
        _state(job).places.pop(job.index, None)

    def _quantum_of(self, queue: int) -> float:
        return math.inf if queue >= self.queues - 1 else self.quantum * self.ratio**queue

    def _place(self, job: Job) -> "Place":
        return _state(job).places[job.index]


@dataclass
class Place:
    """Where a job stands.

    Attributes:
        job: which stands there.
        joined_at: second of arrival at its queue.
        served_at: second of its last service, or of its own arrival.
        queue: number of its queue.
        used: seconds of service in it.
        starving: whether it was seen to have waited for too long, and has not been served since.
        promoted_at: second at which it starves, as it was last seen to wait.
    """

    job: Job
    joined_at: float
    served_at: float
    queue: int = 0
    used: float = 0.0
    starving: bool = False
    promoted_at: float = math.inf

    @property
    def waits_since(self) -> float:
        """Second from which on it waits, if it is not being served."""
        return max(self.served_at, self.job.requested)


@dataclass
class QueuesState:
    """What one scheduler remembers.

    Attributes:
        places: of its jobs, by index.
        now: second of the latest arrival or service.
    """

    places: dict[int, Place] = field(default_factory=dict)
    now: float = 0.0


def _state(job: Job) -> QueuesState:
    if not isinstance(job.state, QueuesState):
        raise DemandError(
            f"job {job.index} stands in no queue; a scheduler sets job.state to one "
            "policy.new_state() for all its jobs"
        )
    return job.state
