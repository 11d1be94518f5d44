"""Least attained service, of which old service counts for less."""

import math
from dataclasses import dataclass, field
from typing import final

from typing_extensions import override

from demand.arguments import positive_seconds
from demand.errors import DemandError
from demand.policies.base import Policy, Rank
from demand.policies.exact_thresholds import whole_quanta
from demand.policies.job import Job

_ONE_BY_ONE = 1000
"""Quanta that end in one piece of service and are added one after another; more are a series."""


@final
@dataclass(frozen=True)
class DecayingLAS(Policy):
    """Least attained service first, of which half is forgotten every `half_life_seconds`.

    The strategy "las" of the program-aware fairness of the llm-d router (its pull request 1534:
    attained service of a program, with a half-life on the clock of 60 s), here over jobs. A job
    that has waited comes before those that were served since, though it attained more in all. It
    never comes before one that has attained nothing, so that a stream of newcomers starves it.

    While a job waits its service decays by the same factor as everybody's, so that the order stands
    still. The rank leaves that factor out: it is the second on the clock at which the service will
    have decayed to one second, t + half_life * log2(a) for a seconds at second t.

    Departures: the router adds a fifth of the age of the oldest request in a program's queue, and
    counts tokens; here it is service alone, in seconds. It is counted by whole quanta, each at its
    end, so that jobs do not swap at every instant. The present versions of the router decay by
    each request as it completes.

    Args:
        half_life_seconds: on the clock of the scheduler; 60 in llm-d.
        quantum: seconds of service.

    Raises:
        DemandError: a half-life or a quantum that is not positive and finite.
    """

    half_life_seconds: float = 60.0
    quantum: float = 1.0

    def __post_init__(self) -> None:
        for name in ("half_life_seconds", "quantum"):
            object.__setattr__(self, name, positive_seconds(name, getattr(self, name)))

    @property
    @override
    def by_clock(self) -> bool:
        """A quantum decays from its end on."""
        return True

    @override
    def new_state(self) -> "Decayed":
        """What all jobs of one scheduler have attained."""
        return Decayed()

    @override
    def rank(self, job: Job, now: float) -> float:
        """Second at which its attained service will have decayed to one; minus infinity for none.

        Raises:
            DemandError: a job without the state of a scheduler.
        """
        return _attained(job).rank

    @override
    def next_above(self, job: Job, threshold: Rank) -> float:
        """The end of the present quantum: what the rank is then depends on when that will be."""
        mine = _attained(job)
        left = (whole_quanta(mine.seconds, self.quantum) + 1) * self.quantum - mine.seconds
        end = job.attained_service + left
        return end if end > job.attained_service else math.nextafter(end, math.inf)

    @override
    def arrived(self, job: Job, now: float) -> None:
        """It has attained nothing."""
        _state(job).jobs[job.index] = Attained()

    @override
    def served(self, job: Job, seconds: float, now: float) -> None:
        """Add the quanta that have ended, each as of its end, to what is left of those before.

        Within a piece seconds of service are taken for seconds on the clock: of one that ends `now`
        a quantum ended as much earlier as service came after it. That is exact in a queue of
        servers, and on an engine, which tells of each step, wrong by less than a step and its
        service.
        """
        mine = _attained(job)
        first = whole_quanta(mine.seconds, self.quantum) + 1
        mine.seconds += seconds
        last = whole_quanta(mine.seconds, self.quantum)
        if last - first < _ONE_BY_ONE:
            for number in range(first, last + 1):
                self._add(mine, self.quantum, now - max(mine.seconds - number * self.quantum, 0.0))
            return
        each = -math.log(2.0) * self.quantum / self.half_life_seconds
        gained = self.quantum * math.expm1(each * (last - first + 1)) / math.expm1(each)
        self._add(mine, gained, now - max(mine.seconds - last * self.quantum, 0.0))

    def _add(self, mine: "Attained", seconds: float, at: float) -> None:
        # log2 of 2^((rank - at) / half-life) + seconds, without the power, which may overflow.
        old, new = (mine.rank - at) / self.half_life_seconds, math.log2(seconds)
        high, low = max(old, new), min(old, new)
        total = high + math.log2(1.0 + 2.0 ** max(low - high, -1000.0))
        mine.rank = at + self.half_life_seconds * total

    @override
    def departed(self, job: Job, now: float) -> None:
        """Forget it."""
        _state(job).jobs.pop(job.index, None)


@dataclass
class Attained:
    """What one job has attained.

    Attributes:
        seconds: all of it.
        rank: second at which what its quanta add up to will have decayed to one second.
    """

    seconds: float = 0.0
    rank: float = -math.inf


@dataclass
class Decayed:
    """What one scheduler remembers: what its jobs have attained, by index."""

    jobs: dict[int, Attained] = field(default_factory=dict)


def _state(job: Job) -> Decayed:
    if not isinstance(job.state, Decayed):
        raise DemandError(
            f"job {job.index} has no decayed service; a scheduler sets job.state to one "
            "policy.new_state() for all its jobs"
        )
    return job.state


def _attained(job: Job) -> Attained:
    return _state(job).jobs[job.index]
