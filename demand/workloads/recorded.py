"""Applications made of recorded runs: one half to learn from, the other half to serve."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np

from demand.arguments import instance_of, mapping_of, share, whole_number
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.graph.pdgraph import PDGraph
from demand.units import CostModel, Execution, check_run
from demand.workloads.workload import Application

Run = Sequence[Execution]


def recorded_applications(
    runs: Mapping[str, Sequence[Run]],
    *,
    training_share: float = 0.5,
    seed: int = 0,
    known: Literal["runs", "graph"] = "runs",
    cost: CostModel | None = None,
) -> tuple[Application, ...]:
    """Applications whose jobs are recorded runs that the scheduler has not seen.

    The runs of an application are split at random: a graph is fitted to the training half, jobs
    are drawn from the other half with equal chances. Applications are weighed by how many runs
    were recorded of them.

        runs = [session.run(leave_out=("human",)) for session in read_agent_sessions(path)]
        applications = recorded_applications({"coding_agent": runs})
        workload = poisson_workload(applications, load=0.9, jobs=2000)

    Args:
        runs: by application, in any order.
        training_share: of the runs to learn from.
        seed: of the split; jobs and arrivals have the seed of the workload.
        known: what the scheduler is told of total demand: the demands of the training "runs", or
            random walks over their "graph", which forgets how long a run has looped.
        cost: seconds of an execution.

    Raises:
        DemandError: no applications, fewer than two runs of one, or a share that leaves one of
            its halves empty.
    """
    runs = mapping_of("runs", runs, "recorded runs by application")
    training_share = share("training_share", training_share)
    if not runs:
        raise DemandError("there are no applications; give recorded runs by name")
    if known not in ("runs", "graph"):
        raise DemandError(f"known is {known!r}; expected runs or graph")
    cost = CostModel() if cost is None else instance_of("cost", cost, CostModel)
    streams = np.random.default_rng(whole_number("seed", seed, least=0)).spawn(len(runs))
    applications = []
    for (name, recorded), rng in zip(runs.items(), streams, strict=True):
        if not isinstance(recorded, Sequence):
            raise DemandError(f"runs[{name!r}] is {recorded!r:.200}; expected a list of runs")
        recorded = [check_run(f"runs[{name!r}][{at}]", run) for at, run in enumerate(recorded)]
        count = round(training_share * len(recorded))
        if not 0 < count < len(recorded):
            raise DemandError(
                f"application {name!r} has {len(recorded)} runs, of which {count} would be "
                "trained on; record more, or choose a training_share that leaves some for each"
            )
        order = rng.permutation(len(recorded))
        training = [recorded[at] for at in order[:count]]
        rest = [recorded[at] for at in order[count:]]
        graph = PDGraph.fit(training, name=name, window=count, cost=cost)
        trained = Distribution([cost.run_seconds(run) for run in training])
        applications.append(
            Application(
                name,
                trained if known == "runs" else graph.remaining(),
                mean_seconds=float(np.mean([cost.run_seconds(run) for run in rest])),
                weight=float(len(recorded)),
                graph=graph,
                sample_runs=partial(_drawn, rest),
                cost=cost,
            )
        )
    return tuple(applications)


def _drawn(runs: Sequence[Run], rng: np.random.Generator, n: int) -> list[Run]:
    return [runs[at] for at in rng.integers(len(runs), size=n)]
