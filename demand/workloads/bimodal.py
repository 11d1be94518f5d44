"""Two applications on which a policy that knows the distribution beats one that knows the mean."""

from collections.abc import Callable
from functools import partial

import numpy as np

from demand.arguments import whole_number
from demand.graph.pdgraph import PDGraph
from demand.seconds import Floats
from demand.units import Execution, Unit
from demand.workloads.workload import Application, Workload, poisson_workload


def bimodal_mix(load: float = 0.8, jobs: int = 10_000, seed: int = 0, servers: int = 1) -> Workload:
    """Poisson arrivals of `bimodal_applications`, half of each: a `Workload`.

    The mean of the first application is the larger, yet most of its jobs are the shortest of
    all: class-mean keeps them behind, Gittins gives each a short try. Ranges and shares are
    ours, not from a paper.
    """
    return poisson_workload(bimodal_applications(), load, jobs, seed, servers)


def bimodal_applications(training_runs: int = 1000, seed: int = 1) -> tuple[Application, ...]:
    """`answer`, 2 to 6 s (80 %) or 60 to 120 s (20 %), and `report`, 8 to 16 s, all uniform.

    Each is one tool unit; its graph is fitted on `training_runs` runs, and what the scheduler
    knows is `graph.remaining()`. True demands are drawn afresh.
    """
    training_runs = whole_number("training_runs", training_runs, least=1)
    streams = np.random.default_rng(whole_number("seed", seed, least=0)).spawn(2)
    return (
        _application("answer", _answer_seconds, 21.2, training_runs, streams[0]),
        _application("report", _report_seconds, 12.0, training_runs, streams[1]),
    )


def _answer_seconds(rng: np.random.Generator, n: int) -> Floats:
    return np.where(rng.random(n) < 0.8, rng.uniform(2.0, 6.0, n), rng.uniform(60.0, 120.0, n))


def _report_seconds(rng: np.random.Generator, n: int) -> Floats:
    return rng.uniform(8.0, 16.0, n)


def _application(
    name: str,
    sample: Callable[[np.random.Generator, int], Floats],
    mean_seconds: float,
    training_runs: int,
    rng: np.random.Generator,
) -> Application:
    run = partial(Execution, Unit(f"{name}_tool", "tool"))
    training = [[run(seconds=s)] for s in sample(rng, training_runs).tolist()]
    graph = PDGraph.fit(training, name=name)
    return Application(name, graph.remaining(), sample, mean_seconds, graph=graph)
