"""A stream of jobs, and how to draw one from applications."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import NamedTuple, TypeVar

import numpy as np

from demand.arguments import (
    check_callable,
    instance_of,
    instances_of,
    mapping_of,
    positive_number,
    positive_seconds,
    whole_number,
)
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.graph.pdgraph import PDGraph
from demand.lazy_runs import MixedRuns, runs_seconds
from demand.seconds import Floats, as_seconds, one_number
from demand.units import CostModel, Execution

T = TypeVar("T")
Sampler = Callable[[np.random.Generator, int], Floats]
"""(generator, n) to `[n]` true demands in seconds."""

RunSampler = Callable[[np.random.Generator, int], Sequence[Sequence[Execution]]]
"""(generator, n) to `[n]` true runs; lazy ones (`demand.lazy_runs`) take no memory for each."""


@dataclass(frozen=True, eq=False)
class Application:
    """A class of jobs: what the scheduler knows of its demand, and what the demand truly is.

    Args:
        name: of the application.
        distribution: of total demand, as known to the scheduler.
        sample: draws true demands; `None` draws from `distribution`, the scheduler being right.
        mean_seconds: true mean demand, which sets the arrival rate; `None` takes the mean of
            `distribution`.
        weight: share of the arrivals, relative to the other applications.
        graph: the demand graph that `distribution` came from, if one did.
        sample_runs: draws true runs instead of demands, which are then what the runs cost.
        cost: of the runs.

    Raises:
        DemandError: a mean or weight that is not positive and finite, an own sampler without its
            mean, or two samplers.
    """

    name: str
    distribution: Distribution
    sample: Sampler | None = field(default=None, repr=False)
    mean_seconds: float | None = None
    weight: float = 1.0
    graph: PDGraph | None = None
    sample_runs: RunSampler | None = field(default=None, repr=False)
    cost: CostModel = field(default_factory=CostModel)

    def __post_init__(self) -> None:
        instance_of(f"distribution of {self.name!r}", self.distribution, Distribution)
        if self.sample is not None and self.sample_runs is not None:
            raise DemandError(
                f"application {self.name!r} has samplers of demands and of runs; give one: the "
                "demand of a run is what it costs"
            )
        if (self.sample or self.sample_runs) is not None and self.mean_seconds is None:
            raise DemandError(
                f"application {self.name!r} has its own sampler and no mean_seconds; give the "
                "true mean of what it draws, which sets the arrival rate"
            )
        instance_of("name of an application", self.name, str)
        if self.graph is not None:
            instance_of(f"graph of {self.name!r}", self.graph, PDGraph)
        instance_of(f"cost of {self.name!r}", self.cost, CostModel)
        for sampler in ("sample", "sample_runs"):
            if getattr(self, sampler) is not None:
                what = f"{sampler} of {self.name!r}"
                check_callable(what, getattr(self, sampler), "a function of (generator, n)")
        what = f"of application {self.name!r}"
        object.__setattr__(self, "weight", positive_number(f"weight {what}", self.weight))
        mean = positive_seconds(f"mean_seconds {what}", self.true_mean_seconds)
        if self.mean_seconds is not None:
            object.__setattr__(self, "mean_seconds", mean)

    @property
    def true_mean_seconds(self) -> float:
        """True mean demand in seconds: `mean_seconds`, or the plain mean of `distribution`."""
        if self.mean_seconds is not None:
            return self.mean_seconds
        return float(self.distribution.values @ self.distribution.weights)

    def demands(self, rng: np.random.Generator, n: int) -> Floats:
        """Draw the true demands of `n` jobs, `[n]` seconds."""
        return self.draw(rng, n).demands

    def draw(self, rng: np.random.Generator, n: int) -> "Drawn":
        """Draw `n` jobs: their demands, and what each executes where the application says.

        Raises:
            DemandError: a sampler that draws another number of them.
        """
        runs = None if self.sample_runs is None else self.sample_runs(rng, n)
        if runs is not None:
            demands = runs_seconds(runs, self.cost)
        elif self.sample is not None:
            drawn = self.sample(rng, n)
            demands = as_seconds(f"what application {self.name!r} draws", drawn)
        else:
            known = self.distribution
            demands = rng.choice(known.values, size=n, p=known.weights)
        if demands.shape != (n,):
            raise DemandError(
                f"the sampler of application {self.name!r} drew shape {demands.shape} when asked "
                f"for {n} jobs; expected one each"
            )
        return Drawn(demands, runs)


class Drawn(NamedTuple):
    """Jobs drawn of one application.

    Attributes:
        demands: `[n]` true seconds.
        runs: `[n]` what each executes, if the application says.
    """

    demands: Floats
    runs: Sequence[Sequence[Execution]] | None


@dataclass(frozen=True, eq=False)
class Workload:
    """The jobs of a simulation, in order of arrival, with what is known of them and what is true.

    Args:
        arrivals: `[n]` seconds, ascending.
        demands: `[n]` true total demand in seconds.
        applications: `[n]` names.
        distributions: what the scheduler knows, by application name.
        load: offered load per server that it was drawn for; NaN if unknown.
        deadlines: `[n]` seconds on the clock of the arrivals, infinity for none; `None` for none.
        tenants: `[n]` who each job belongs to, such as a customer: what fair policies share
            between; `None` makes every application a tenant.
        weights: share of a tenant relative to the others, 1 for those not named.
        priorities: `[n]` classes, smaller first; `None` puts all jobs into class 0.
        runs: `[n]` what each job truly executes, for simulators that serve units and for
            refinement; `None` if only the demands are known.
        graphs: demand graphs by application name, where they are known.

    Raises:
        DemandError: no jobs, lengths that differ, arrivals out of order, numbers that are
            negative or not finite, priorities that are no numbers, or an application
            without a distribution.
    """

    arrivals: Floats
    demands: Floats
    applications: Sequence[str] = field(repr=False)
    distributions: Mapping[str, Distribution]
    load: float = float("nan")
    deadlines: Floats = None  # type: ignore[assignment]  # filled in below
    tenants: Sequence[str] = None  # type: ignore[assignment]
    weights: Mapping[str, float] = field(default_factory=dict)
    priorities: Sequence[int] = None  # type: ignore[assignment]
    runs: Sequence[Sequence[Execution]] | None = field(default=None, repr=False)
    graphs: Mapping[str, PDGraph] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        fill = partial(object.__setattr__, self)
        for name in ("arrivals", "demands"):
            numbers = as_seconds(name, getattr(self, name))
            fill(name, numbers)
            if numbers.ndim != 1 or not numbers.size:
                raise DemandError(f"{name} has shape {numbers.shape}; expected [n], n at least 1")
            if not (np.isfinite(numbers) & (numbers >= 0.0)).all():
                raise DemandError(f"{name} has a negative or non-finite entry; expected seconds")
        n = self.arrivals.size
        fill("applications", _names("applications", self.applications))
        for field_name, kind in (("distributions", Distribution), ("graphs", PDGraph)):
            given = getattr(self, field_name)
            by_name = mapping_of(field_name, given, f"a {kind.__name__} by application")
            for name, value in by_name.items():
                instance_of(f"{field_name.removesuffix('s')} of {name!r}", value, kind)
            fill(field_name, by_name)
        weights = mapping_of("weights", self.weights, "a share by tenant").items()
        fill("weights", {t: positive_number(f"weight of tenant {t!r}", w) for t, w in weights})
        fill("deadlines", as_seconds("deadlines", _or(self.deadlines, np.full(n, np.inf))))
        fill("tenants", _names("tenants", _or(self.tenants, self.applications)))
        fill("priorities", tuple(_or(self.priorities, [0] * n)))
        for name in ("arrivals", "demands", "deadlines"):
            getattr(self, name).setflags(write=False)
        self._check_lengths(n)
        back = np.flatnonzero(np.diff(self.arrivals) < 0.0)
        if back.size:
            at = int(back[0]) + 1
            raise DemandError(
                f"arrivals[{at}] is {self.arrivals[at]}, before its predecessor; sort the jobs"
            )
        if np.isnan(self.deadlines).any() or (self.deadlines < self.arrivals).any():
            raise DemandError(
                "a deadline is NaN or before its job arrives; deadlines are seconds on the clock "
                "of the arrivals, infinity for none"
            )
        strangers = set(self.applications) - set(self.distributions)
        if strangers:
            raise DemandError(
                f"applications {sorted(strangers)} have no distribution; add one for each to "
                "distributions, if only a rough one, or demand.policies.NEVER_SEEN, which ranks "
                "their jobs by attained service"
            )
        for priority in set(self.priorities):
            if (
                not isinstance(priority, Real)
                or isinstance(priority, np.timedelta64)
                or priority != priority
            ):
                raise DemandError(
                    f"priorities have {priority!r}; expected numbers, smaller first: 0 for all "
                    "that are alike"
                )

    def _check_lengths(self, n: int) -> None:
        columns: dict[str, Sized] = {
            "demands": self.demands,
            "application names": self.applications,
            "deadlines": self.deadlines,
            "tenants": self.tenants,
            "priorities": self.priorities,
        }
        if self.runs is not None:
            if isinstance(self.runs, str) or not isinstance(self.runs, Sequence):
                raise DemandError(f"runs is {self.runs!r:.200}; expected a list of runs, one a job")
            columns["runs"] = self.runs
        for name, column in columns.items():
            if len(column) != n:
                raise DemandError(
                    f"there are {n} arrivals and {len(column)} {name}; expected one of each per job"
                )

    def __len__(self) -> int:
        return self.arrivals.size

    def __repr__(self) -> str:
        return (
            f"Workload({len(self)} jobs of {len(self.distributions)} applications, "
            f"load {self.load:.3g}, mean demand {self.demands.mean():.4g} s)"
        )


def poisson_workload(
    applications: Sequence[Application],
    load: float,
    jobs: int,
    seed: int = 0,
    servers: int = 1,
) -> Workload:
    """Draw jobs that arrive in a Poisson stream at a given load.

    Random numbers are common: for one seed, every policy sees the same jobs, and another load
    only stretches the same arrivals. Where every application draws runs, the workload has them.

    Args:
        applications: drawn from by weight.
        load: offered load per server: arrival rate * mean demand / servers.
        jobs: how many.
        seed: of arrivals, applications and demands, which have a stream each.
        servers: the number of servers that will share the load.

    Raises:
        DemandError: no applications, two of one name, jobs or servers that are not a whole
            number of at least 1, or a load that is not
            positive and finite.
    """
    applications = instances_of("applications", applications, Application)
    names = [application.name for application in applications]
    load = one_number("load", load)
    if not names or len(set(names)) < len(names):
        raise DemandError(f"application names are {names}; expected distinct names, at least one")
    if not 0.0 < load < np.inf:
        raise DemandError(f"load is {load}; expected a positive number, below 1 to be stable")
    jobs, servers = whole_number("jobs", jobs, least=1), whole_number("servers", servers, least=1)
    seed = whole_number("seed", seed, least=0)
    share = np.array([application.weight for application in applications])
    share = share / share.sum()
    mean = float(share @ [application.true_mean_seconds for application in applications])
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2 + len(names))]
    arrivals = np.cumsum(streams[0].exponential(size=jobs)) * (mean / (load * servers))
    kind = streams[1].choice(len(names), size=jobs, p=share)
    demands = np.empty(jobs)
    runs: list[Sequence[Sequence[Execution]]] = []
    for number, application in enumerate(applications):
        mine = np.flatnonzero(kind == number)
        drawn = application.draw(streams[2 + number], mine.size)
        demands[mine] = drawn.demands
        if drawn.runs is not None:
            runs.append(drawn.runs)
    return Workload(
        arrivals,
        demands,
        [names[number] for number in kind.tolist()],
        {application.name: application.distribution for application in applications},
        load,
        runs=MixedRuns.of(runs, kind.astype(np.int32)) if len(runs) == len(names) else None,
        graphs={a.name: a.graph for a in applications if a.graph is not None},
    )


def _names(what: str, given: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(given, Iterable):
        raise DemandError(f"{what} is {given!r:.200}; expected a list of names, one a job")
    return tuple(given)


def _or(given: T | None, default: T) -> T:
    return default if given is None else given
