"""The engine whose jobs are expected to need the least service yet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from demand.policies.job import Job
from demand.routing.base import ReadyUnit, Router, SeenEngine
from demand.routing.load import checked_bound

Expected = list[dict[int, float]]
"""For each engine, seconds by index of the job, of the jobs that are with it."""


@final
@dataclass(frozen=True)
class ExpectedDemand(Router):
    """A job goes to the engine whose jobs have the least expected remaining demand, and stays.

    What a job adds is E[X - a | X > a] at its attained service a, over what is known of its demand
    X: the distribution from which the scheduler on the engine takes its Gittins rank, refined by an
    estimator if there is one. It is taken as each unit becomes ready and stands until the next one
    does, and counts while the job is outside of the engine as well: it will be back. It is the
    whole rest, with the seconds of tools and people, which no engine serves. When the jobs
    of its engine have more than `bound` seconds more than those of the least, the job itself on
    neither side, it moves there.

    Least work left in expectation is classical where all of it is the server's; that the demand of
    an application is known from its graph is Hermes (arXiv 2506.14851), which has one engine.
    Putting the two together is ours.

    Args:
        bound: seconds of expected demand that the jobs of its engine may have beyond those of the
            least before a job moves; 0 weighs every unit anew, infinity never moves a job.

    Raises:
        DemandError: a bound that is negative or no number.
    """

    bound: float = math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "bound", checked_bound(self.bound, "seconds beyond the least"))

    @override
    def new_state(self, engines: int) -> Expected:
        return [{} for _ in range(engines)]

    @override
    def choose(self, unit: ReadyUnit, engines: Sequence[SeenEngine], state: Expected) -> int:
        job, home = unit.job, unit.last
        if home is not None:
            del state[home][job.index]
        at = home
        if home is None or self.bound < math.inf:
            expected = [sum(jobs.values()) for jobs in state]
            least = expected.index(min(expected))
            if home is None or expected[home] - expected[least] > self.bound:
                at = least
        assert at is not None
        state[at][job.index] = job.distribution.mean(job.age)
        return at

    @override
    def departed(self, job: Job, state: Expected) -> None:
        for jobs in state:
            jobs.pop(job.index, None)
