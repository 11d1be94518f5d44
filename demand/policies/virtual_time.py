"""Completion order under fair sharing."""

import math
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import final

from typing_extensions import override

from demand.arguments import positive_number
from demand.errors import DemandError
from demand.policies.base import Policy, Rank, number
from demand.policies.exact_thresholds import greatest_within
from demand.policies.job import Job
from demand.policies.mean_demand import has_mean, mean_demand, next_mean_above


@final
@dataclass(frozen=True)
class VirtualTime(Policy):
    """Jobs in the order in which fair sharing would finish them (Justitia, arXiv 2510.17015).

    A job that arrives at virtual time V gets the virtual finish V + demand / weight, for good. The
    virtual clock runs at servers / (sum of the weights) over the jobs that fair sharing would
    still be serving. With exact demands, one server and equal weights this is the fair sojourn
    protocol (Friedman and Henderson 2003), under which no job finishes later than if all shared
    the server.

    Departures from the paper: demand is the mean total seconds of the application, where the paper
    predicts memory held over time per agent; the weight is that of the job's tenant. A job that
    outlives its mean keeps its early rank. One of an application never seen before (`NEVER_SEEN`)
    is taken to demand what it has attained.

    Args:
        servers: how many the jobs share.

    Raises:
        DemandError: servers that are not positive and finite; a clock that goes backwards.
    """

    servers: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "servers", positive_number("servers", self.servers))

    @override
    def new_state(self) -> "VirtualClock":
        """The virtual clock that all jobs of one scheduler share."""
        return VirtualClock(self.servers)

    @override
    def rank(self, job: Job, now: float) -> float:
        """Virtual second at which fair sharing would finish the job."""
        return _clock(job).starts[job.index] + mean_demand(job) / job.weight

    @override
    def next_above(self, job: Job, threshold: Rank) -> float:
        """Infinity: a virtual finish stands still, but for applications never seen before."""
        if has_mean(job):
            return math.inf
        above, start = number(threshold, self), _clock(job).starts[job.index]
        within = greatest_within(
            lambda mean: start + mean / job.weight, above, (above - start) * job.weight
        )
        return next_mean_above(job, within)

    @override
    def arrived(self, job: Job, now: float) -> None:
        """Let the job share from the virtual second at which it arrives."""
        _clock(job).start(job, now)

    @override
    def departed(self, job: Job, now: float) -> None:
        """Forget the virtual second at which the job arrived."""
        del _clock(job).starts[job.index]


@dataclass
class VirtualClock:
    """Virtual time, and the jobs that fair sharing would still be serving.

    Attributes:
        servers: how many the jobs share.
        virtual: virtual seconds when the clock was last advanced.
        second: when that was, on the clock of the scheduler.
        weights: sum of the weights of the jobs that share.
        sharing: heap of (virtual finish, index, weight) of the jobs that share.
        starts: virtual second at which each unfinished job arrived, by index.
    """

    servers: float
    virtual: float = 0.0
    second: float = 0.0
    weights: float = 0.0
    sharing: list[tuple[float, int, float]] = field(default_factory=list)
    starts: dict[int, float] = field(default_factory=dict)

    def start(self, job: Job, now: float) -> None:
        """Advance to second `now` and let `job` share from there."""
        if not now >= self.second:
            raise DemandError(
                f"job {job.index} arrives at {now} and the clock stood at {self.second} before; "
                "the clock of a scheduler must not go backwards"
            )
        while self.sharing:
            finish, _, weight = self.sharing[0]
            pace = self.servers / self.weights
            reached = self.second + (finish - self.virtual) / pace
            if reached > now:
                self.virtual += (now - self.second) * pace
                break
            heappop(self.sharing)
            self.second, self.virtual = reached, finish
            self.weights = self.weights - weight if self.sharing else 0.0
        self.second = now
        self.starts[job.index] = self.virtual
        finish = self.virtual + mean_demand(job) / job.weight
        heappush(self.sharing, (finish, job.index, job.weight))
        self.weights += job.weight


def _clock(job: Job) -> VirtualClock:
    if not isinstance(job.state, VirtualClock):
        raise DemandError(
            f"job {job.index} has no virtual clock; a scheduler sets job.state to one "
            "policy.new_state() for all its jobs"
        )
    return job.state
