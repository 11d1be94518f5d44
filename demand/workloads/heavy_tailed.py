"""Applications of a heavy tail: most of the work is in few jobs."""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from demand.arguments import whole_number
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.seconds import Floats
from demand.workloads.workload import Application, Sampler, Workload, poisson_workload

Tail = Literal["lognormal", "pareto"]

PARETO_INDEX = 1.5
PARETO_SECONDS = 2.5, 10_000.0  # least and largest


def heavy_tailed_mix(
    load: float = 0.8,
    jobs: int = 10_000,
    seed: int = 0,
    servers: int = 1,
    tail: Tail = "lognormal",
) -> Workload:
    """Poisson arrivals of `heavy_tailed_applications`, half of each: a `Workload`.

    The means of the two are close, so class-mean learns next to nothing; but what an `agent` job
    still needs grows with what it has had, which SERPT and Gittins see.
    """
    return poisson_workload(heavy_tailed_applications(tail), load, jobs, seed, servers)


def heavy_tailed_applications(
    tail: Tail = "lognormal", training_samples: int = 1000, seed: int = 1
) -> tuple[Application, ...]:
    """`agent`, of a heavy tail, and `report`, uniform on 4 to 12 s (mean 8 s).

    An `agent` job takes exp(2 Z) seconds for a normal Z ("lognormal": median 1 s, mean 7.39 s,
    squared coefficient of variation 54), or follows a Pareto law of index 1.5 from 2.5 s on, cut
    at 10,000 s ("pareto": mean 7.38 s). Both are ours, not from a paper. The scheduler knows
    `training_samples` demands of each, true demands are drawn afresh.

    Raises:
        DemandError: a tail that is neither.
    """
    if tail not in _AGENTS:
        raise DemandError(f"tail is {tail!r}; expected one of {', '.join(_AGENTS)}")
    training_samples = whole_number("training_samples", training_samples, least=1)
    streams = np.random.default_rng(whole_number("seed", seed, least=0)).spawn(2)
    sample, mean_seconds = _AGENTS[tail]
    return (
        _application("agent", sample, mean_seconds, training_samples, streams[0]),
        _application("report", _report_seconds, 8.0, training_samples, streams[1]),
    )


def _lognormal_seconds(rng: np.random.Generator, n: int) -> Floats:
    return rng.lognormal(0.0, 2.0, n)


def _pareto_seconds(rng: np.random.Generator, n: int) -> Floats:
    least, largest = PARETO_SECONDS
    reach = 1.0 - (least / largest) ** PARETO_INDEX
    return least * (1.0 - reach * rng.random(n)) ** (-1.0 / PARETO_INDEX)


def _pareto_mean() -> float:
    least, largest = PARETO_SECONDS
    reach = 1.0 - (least / largest) ** PARETO_INDEX
    excess = least * PARETO_INDEX / (PARETO_INDEX - 1.0)
    return excess * (1.0 - (least / largest) ** (PARETO_INDEX - 1.0)) / reach


def _report_seconds(rng: np.random.Generator, n: int) -> Floats:
    return rng.uniform(4.0, 12.0, n)


_AGENTS: Mapping[str, tuple[Callable[[np.random.Generator, int], Floats], float]] = {
    "lognormal": (_lognormal_seconds, float(np.exp(2.0))),
    "pareto": (_pareto_seconds, _pareto_mean()),
}


def _application(
    name: str, sample: Sampler, mean_seconds: float, samples: int, rng: np.random.Generator
) -> Application:
    return Application(name, Distribution(sample(rng, samples)), sample, mean_seconds)
