"""Applications whose runs are drawn from published samples of their stages."""

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np

from demand.arguments import instances_of, mapping_of, positive_number, whole_number
from demand.errors import DemandError
from demand.graph.pdgraph import PDGraph
from demand.traces.profiles import ApplicationProfile
from demand.units import Execution
from demand.workloads.workload import Application


def profiled_applications(
    profiles: Iterable[ApplicationProfile],
    *,
    weights: Mapping[str, float] | None = None,
    training_runs: int = 1000,
    seed: int = 1,
) -> tuple[Application, ...]:
    """Applications of profiles: a graph fitted on drawn runs, true demands from fresh ones.

        profiles = read_hermes_artifact("pdgraphs.json")
        workload = poisson_workload(profiled_applications(profiles), load=0.9, jobs=2000)

    The scheduler is told random walks over the graph, as with `hermes_applications`, whose runs are
    drawn from means. The true mean, which sets the rate of arrivals, is that of the training runs.

    Args:
        profiles: one for each application, such as those of `read_hermes_artifact`.
        weights: shares of the arrivals by application, and which of the profiles are taken; `None`
            takes all, at one weight.
        training_runs: runs each graph is fitted on.
        seed: of the training runs.

    Raises:
        DemandError: no profiles, two of one application, or a weight of an application without a
            profile.
    """
    known: dict[str, ApplicationProfile] = {}
    for profile in instances_of("profiles", profiles, ApplicationProfile):
        if profile.application in known:
            raise DemandError(f"two profiles are of {profile.application!r}; give one of each")
        known[profile.application] = profile
    if not known:
        raise DemandError("there are no profiles; give one for each application")
    weighed = mapping_of("weights", weights or dict.fromkeys(known, 1.0), "a number by application")
    strangers = [name for name in weighed if name not in known]
    if strangers:
        raise DemandError(
            f"weights name {', '.join(map(repr, strangers))}; there are profiles of "
            f"{', '.join(known)}"
        )
    training_runs = whole_number("training_runs", training_runs, least=1)
    streams = np.random.default_rng(whole_number("seed", seed, least=0)).spawn(len(weighed))
    applications = []
    for (name, weight), rng in zip(weighed.items(), streams, strict=True):
        training = _drawn(known[name], rng, training_runs)
        graph = PDGraph.fit(training, name=name, window=training_runs)
        applications.append(
            Application(
                name,
                graph.remaining(),
                mean_seconds=float(np.mean([graph.cost.run_seconds(run) for run in training])),
                weight=positive_number(f"weight of {name!r}", weight),
                graph=graph,
                sample_runs=partial(_drawn, known[name]),
            )
        )
    return tuple(applications)


def _drawn(profile: ApplicationProfile, rng: np.random.Generator, n: int) -> list[list[Execution]]:
    return [profile.session(rng).run() for _ in range(n)]
