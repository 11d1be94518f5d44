"""Applications made of recorded runs: some to learn from, the others to serve."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, get_args

import numpy as np

from demand.arguments import instance_of, mapping_of, share, whole_number
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.graph.pdgraph import PDGraph
from demand.lazy_runs import PickedRuns
from demand.units import CostModel, Execution, check_run, check_waits
from demand.workloads.workload import Application

Run = Sequence[Execution]
Runs = Mapping[str, Sequence[Run]]
Split = Literal["random", "time"]
Halves = tuple[list[Run], list[Run]]


def recorded_applications(
    runs: Runs | None = None,
    *,
    train: Runs | None = None,
    test: Runs | None = None,
    training_share: float | None = None,
    split: Split | None = None,
    seed: int = 0,
    known: Literal["runs", "graph"] = "runs",
    cost: CostModel | None = None,
) -> tuple[Application, ...]:
    """Applications whose jobs are recorded runs that the scheduler has not seen.

    A graph is fitted to some of the runs of an application, and jobs are drawn from the others with
    equal chances. Which are which is a split of `runs`, at random or by time, or given as `train`
    and `test`, of two files say:

        runs = [session.run(leave_out=("human",)) for session in read_agent_sessions(path)]
        applications = recorded_applications({"coding_agent": runs}, split="time")
        workload = poisson_workload(applications, load=0.9, jobs=2000)
        applications = recorded_applications(train={"agent": monday}, test={"agent": tuesday})

    Who schedules knows the past alone: a split at random lets it learn from runs that came later,
    or of the same task. Applications are weighed by how many runs of them are in `runs`, or in
    `test`.

    Args:
        runs: by application; in order of time for a split by time, else in any order.
        train: by application, in place of `runs`: what is learned from, the oldest first.
        test: what is served, of the same applications.
        training_share: of `runs`, to learn from; `None` is one half.
        split: of `runs`; by "time" the first ones are learned from. `None` is "random".
        seed: of a split at random; jobs and arrivals have the seed of the workload.
        known: what the scheduler is told of total demand: the demands of the training "runs", or
            random walks over their "graph", which forgets how long a run has looped.
        cost: seconds of an execution.

    Raises:
        DemandError: neither `runs` nor both of `train` and `test`, or all of them; applications of
            which one of the two has no runs; no applications; a share that leaves one of its halves
            empty, or a share or a split of what is split already.
    """
    if known not in ("runs", "graph"):
        raise DemandError(f"known is {known!r}; expected runs or graph")
    cost = CostModel() if cost is None else instance_of("cost", cost, CostModel)
    seed = whole_number("seed", seed, least=0)
    if runs is None:
        halves = _given(train, test)
        if training_share is not None or split is not None:
            raise DemandError(
                "train and test are given, and a training_share or a split, which divide runs; "
                "drop these, or give runs"
            )
        weights = {name: len(served) for name, (_, served) in halves.items()}
    else:
        if train is not None or test is not None:
            raise DemandError("runs are given, and train or test; give runs, or the two others")
        halves = _divided(_checked("runs", runs), training_share, split, seed)
        weights = {name: len(first) + len(second) for name, (first, second) in halves.items()}
    applications = []
    for name, (training, served) in halves.items():
        graph = PDGraph.fit(training, name=name, window=len(training), cost=cost)
        trained = Distribution([cost.run_seconds(run) for run in training])
        applications.append(
            Application(
                name,
                trained if known == "runs" else graph.remaining(),
                mean_seconds=float(np.mean([cost.run_seconds(run) for run in served])),
                weight=float(weights[name]),
                graph=graph,
                sample_runs=partial(_drawn, served),
                cost=cost,
            )
        )
    return tuple(applications)


def _checked(what: str, runs: Runs) -> dict[str, list[Run]]:
    runs = mapping_of(what, runs, "recorded runs by application")
    if not runs:
        raise DemandError(
            "there are no applications; give recorded runs by name"
            if what == "runs"
            else f"{what} has no applications; give recorded runs by name"
        )
    checked: dict[str, list[Run]] = {}
    for name, recorded in runs.items():
        if not isinstance(recorded, Sequence):
            raise DemandError(f"{what}[{name!r}] is {recorded!r:.200}; expected a list of runs")
        checked[name] = [
            check_run(f"{what}[{name!r}][{at}]", run) for at, run in enumerate(recorded)
        ]
        for at, run in enumerate(checked[name]):
            check_waits(f"{what}[{name!r}][{at}]", run)
    return checked


def _given(train: Runs | None, test: Runs | None) -> dict[str, Halves]:
    if train is None or test is None:
        raise DemandError("give runs, or both train and test: recorded runs by application")
    learned, served = _checked("train", train), _checked("test", test)
    for name in {**learned, **served}:
        for what, runs in (("train", learned), ("test", served)):
            if not runs.get(name):
                raise DemandError(
                    f"{what} has no runs of {name!r}; expected the same applications in train and "
                    "in test: leave it out of both, or give runs to each"
                )
    return {name: (learned[name], served[name]) for name in served}


def _divided(
    runs: dict[str, list[Run]], training_share: float | None, split: Split | None, seed: int
) -> dict[str, Halves]:
    part = 0.5 if training_share is None else share("training_share", training_share)
    if split is not None and split not in get_args(Split):
        raise DemandError(f"split is {split!r}; expected one of {', '.join(get_args(Split))}")
    streams = np.random.default_rng(seed).spawn(len(runs))
    halves = {}
    for (name, recorded), rng in zip(runs.items(), streams, strict=True):
        count = round(part * len(recorded))
        if not 0 < count < len(recorded):
            raise DemandError(
                f"application {name!r} has {len(recorded)} runs, of which {count} would be "
                "trained on; record more, or choose a training_share that leaves some for each"
            )
        order = range(len(recorded)) if split == "time" else rng.permutation(len(recorded))
        ordered = [recorded[at] for at in order]
        halves[name] = ordered[:count], ordered[count:]
    return halves


def _drawn(runs: Sequence[Run], rng: np.random.Generator, n: int) -> PickedRuns:
    return PickedRuns(runs, rng.integers(len(runs), size=n))
