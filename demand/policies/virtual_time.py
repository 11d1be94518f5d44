"""Completion order under fair sharing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import final

from typing_extensions import override

from demand.arguments import mapping_of, positive_number
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

    Departures from the paper: without `costs` demand is the mean total seconds of the application,
    where the paper predicts memory held over time per agent; with `costs` in KV-time it is the mean
    of that by application. The weight is that of the job's tenant. A job that outlives its mean
    keeps its early rank. Without `costs` one of an application never seen before (`NEVER_SEEN`) is
    taken to demand what it has attained.

    Args:
        servers: how many the jobs share; with `costs`, what all of them get in a second. For costs
            in `kv_time` those are the tokens of KV that the engine has times its steps a second.
        costs: by application, what a job demands, in a unit that fair sharing gives out; a mapping
            or its items, kept as sorted items. `None` for the mean seconds.

    Raises:
        DemandError: servers or a cost that are not positive and finite; a job of an application
            without a cost; a clock that goes backwards.
    """

    servers: float = 1.0
    costs: Mapping[str, float] | tuple[tuple[str, float], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "servers", positive_number("servers", self.servers))
        if self.costs is not None:
            named = mapping_of("costs", _mapping(self.costs), "the cost of a job by application")
            costs = ((name, positive_number(f"cost of {name!r}", c)) for name, c in named.items())
            object.__setattr__(self, "costs", tuple(sorted(costs)))

    @override
    def new_state(self) -> "VirtualClock":
        """The virtual clock that all jobs of one scheduler share."""
        return VirtualClock(self.servers, None if self.costs is None else dict(self.costs))

    @override
    def rank(self, job: Job, now: float) -> float:
        """Virtual second at which fair sharing would finish the job."""
        clock = _clock(job)
        return clock.starts[job.index] + clock.demand(job) / job.weight

    @override
    def next_above(self, job: Job, threshold: Rank) -> float:
        """Infinity: a virtual finish stands still, but for applications never seen before."""
        if self.costs is not None or has_mean(job):
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
        costs: by application, what a job demands; `None` for the mean seconds.
        virtual: virtual seconds when the clock was last advanced.
        second: when that was, on the clock of the scheduler.
        weights: sum of the weights of the jobs that share.
        sharing: heap of (virtual finish, index, weight) of the jobs that share.
        starts: virtual second at which each unfinished job arrived, by index.
    """

    servers: float
    costs: dict[str, float] | None = None
    virtual: float = 0.0
    second: float = 0.0
    weights: float = 0.0
    sharing: list[tuple[float, int, float]] = field(default_factory=list)
    starts: dict[int, float] = field(default_factory=dict)

    def demand(self, job: Job) -> float:
        """What `job` demands of what is shared.

        Raises:
            DemandError: there are costs, and none for its application.
        """
        if self.costs is None:
            return mean_demand(job)
        if job.application not in self.costs:
            raise DemandError(
                f"application {job.application!r} has no cost, only {', '.join(self.costs)}; give "
                "it one, such as the mean of the others"
            )
        return self.costs[job.application]

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
        finish = self.virtual + self.demand(job) / job.weight
        heappush(self.sharing, (finish, job.index, job.weight))
        self.weights += job.weight


def _mapping(costs: object) -> object:
    """`costs` as a mapping, where they are items, as a policy keeps them."""
    return dict(costs) if isinstance(costs, tuple) else costs


def _clock(job: Job) -> VirtualClock:
    if not isinstance(job.state, VirtualClock):
        raise DemandError(
            f"job {job.index} has no virtual clock; a scheduler sets job.state to one "
            "policy.new_state() for all its jobs"
        )
    return job.state
