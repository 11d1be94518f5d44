"""A job as a policy sees it: what it is, and how its service stands."""

import math
from dataclasses import dataclass, field
from typing import Any

from demand.arguments import instance_of, warn_renamed_method
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.seconds import one_number


class Service:
    """How the service of a job stands: the part of a `Job` that its scheduler keeps current.

    Policies read it and leave it as it is. Only `table` and `state` are theirs: what
    `Policy.table` and `Policy.new_state` gave, which the scheduler hangs on the job and never looks
    into.

    Attributes:
        attained_service: seconds of service received so far.
        running: whether the job is being served.
        started_at: attained service when it was last put into service.
        requested: second at which its present request was submitted; that of arrival at first.
        distribution: what is known of its demand in seconds, counted from `known_at` on.
        known_at: attained service at which `distribution` was learned.
        table: what `Policy.table` made of `distribution`; None for nothing.
        state: what `Policy.new_state` gave the scheduler, one object for all its jobs.
    """

    __slots__ = (
        "attained_service",
        "distribution",
        "known_at",
        "requested",
        "running",
        "started_at",
        "state",
        "table",
    )

    attained_service: float
    running: bool
    started_at: float
    requested: float
    distribution: Distribution
    known_at: float
    table: Any
    state: Any

    @property
    def age(self) -> float:
        """Seconds of service since `distribution` was learned: the age to ask it for."""
        return self.attained_service - self.known_at

    def attained_at(self, age: float) -> float:
        """Least attained service at which `age` is reached."""
        if self.known_at == 0.0:
            return age
        attained = self.known_at + age
        while attained - self.known_at < age:  # the sum was rounded down
            attained = math.nextafter(attained, math.inf)
        while (below := math.nextafter(attained, 0.0)) - self.known_at >= age:  # or up
            attained = below
        return attained

    def expect(self, remaining: Distribution, table: Any) -> None:
        """Take in what its progress says: the distribution of its demand from here on.

        For the scheduler. A distribution that is `extrapolated` says nothing: what was known stays
        and its age runs on, so that the job does not come to look nearly done as it is served
        beyond all samples.
        """
        if remaining.extrapolated:
            return
        self.distribution, self.table = remaining, table
        self.known_at = self.attained_service

    def learn(self, remaining: Distribution, table: Any) -> None:
        """The old name of `expect`."""
        warn_renamed_method("Job", "learn", "expect")
        self.expect(remaining, table)


@dataclass(slots=True, eq=False)
class Job(Service):
    """One application in the system: all that a policy may rank it by.

    What it is (the arguments that are not `Service`, and `prior`) stands from its arrival on. How
    its service stands (`Service`) changes while it is in the system, by its scheduler alone.

    Args:
        index: position in order of arrival; ties of rank go to the smaller index (FCFS).
        application: name of the application.
        arrival: second at which it arrived.
        distribution: what is known of its total demand in seconds, on arrival; `Service` later.
        demand: its true total demand in seconds; only an oracle may read it.
        attained_service: seconds of service received before; `Service` later.
        lottery: a uniform number in [0, 1), drawn from the seed of the simulation.
        table: what `Policy.table` made of `distribution`, None for nothing; `Service` later.
        deadline: second by which it should be finished; infinity for none.
        tenant: who pays for it; fair sharing is among tenants.
        weight: share of its tenant relative to the others.
        priority: class that a priority policy serves by, smaller first.

    Attributes:
        prior: what was known of its total demand on arrival.

    Raises:
        DemandError: an arrival that is not finite, a deadline or priority that is NaN, a weight
            that is not positive and finite, service or a demand that is negative.
    """

    index: int
    application: str
    arrival: float
    distribution: Distribution
    demand: float = math.nan
    attained_service: float = 0.0
    lottery: float = 0.0
    table: Any = None
    deadline: float = math.inf
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    prior: Distribution = field(init=False)
    # Of `Service`, besides the three arguments above: how it starts.
    running: bool = field(init=False, default=False)
    started_at: float = field(init=False, default=0.0)
    requested: float = field(init=False)
    known_at: float = field(init=False, default=0.0)
    state: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        if type(self.distribution) is not Distribution:
            instance_of(f"distribution of job {self.index}", self.distribution, Distribution)
        try:
            good = (
                -math.inf < self.arrival < math.inf
                and -math.inf <= self.deadline <= math.inf
                and 0.0 <= self.attained_service < math.inf
                and 0.0 < self.weight < math.inf
                and -math.inf <= self.priority <= math.inf
                and not self.demand < 0.0
            )
        except TypeError:  # what is no number compares with none
            good = False
        if not good:
            self._refuse()
        self.prior = self.distribution
        self.requested = self.arrival

    def _refuse(self) -> None:
        for name, good, expected in (
            ("arrival", math.isfinite, "finite seconds"),
            ("deadline", lambda x: x == x, "seconds, infinity for none"),
            ("attained_service", lambda x: 0.0 <= x < math.inf, "finite seconds of at least 0"),
            ("weight", lambda x: 0.0 < x < math.inf, "a positive finite number, 1 for all alike"),
            ("priority", lambda x: x == x, "a number, 0 for all alike"),
            ("demand", lambda x: not x < 0.0, "seconds of at least 0, NaN if unknown"),
        ):
            value = getattr(self, name)
            if not good(one_number(f"{name} of job {self.index}", value)):
                raise DemandError(f"{name} of job {self.index} is {value}; expected {expected}")
