"""Applications whose runs are drawn from published samples of their stages."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from demand.arguments import instances_of, mapping_of, positive_number, whole_number
from demand.errors import DemandError
from demand.flow import Ints, visits_together
from demand.graph.pdgraph import PDGraph
from demand.lazy_runs import ColumnRuns
from demand.seconds import Floats
from demand.traces.profiles import ApplicationProfile, StageProfile
from demand.units import END, Unit
from demand.workloads.workload import Application

N = TypeVar("N", bound=np.generic)


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
        training = [known[name].session(rng).run() for _ in range(training_runs)]
        graph = PDGraph.fit(training, name=name, window=training_runs)
        applications.append(
            Application(
                name,
                graph.remaining(),
                mean_seconds=float(np.mean([graph.cost.run_seconds(run) for run in training])),
                weight=positive_number(f"weight of {name!r}", weight),
                graph=graph,
                sample_runs=partial(draw_runs, known[name]),
            )
        )
    return tuple(applications)


def draw_runs(profile: ApplicationProfile, rng: np.random.Generator, n: int) -> ColumnRuns:
    """Draw `n` runs together, a step of all at a time, by the law of `profile.session(rng).run()`.

    Of one seed they are others than those. They make their executions when asked.

    Args:
        profile: of an application.
        rng: to draw from.
        n: how many.
    """
    names = list(profile.stages)
    stages = list(profile.stages.values())
    number = {name: at for at, name in enumerate([*names, END])}
    left = np.zeros(n, np.int32)  # rounds of the stage that each run is at

    def following(going: Ints, at: Ints) -> Ints:
        after, rounds = at.copy(), np.maximum(left[going], 1)
        for profiled, mine in _by_stage(stages, at):
            begun = mine[left[going[mine]] == 0]
            if profiled.rounds:
                rounds[begun] = rng.choice(np.array(profiled.rounds, np.int32), begun.size)
            over = mine[rounds[mine] == 1]
            ways = np.array([number[name] for name in profiled.successors], at.dtype)
            after[over] = rng.choice(ways, over.size, p=profiled.chances or None)
        left[going] = rounds - 1
        return after

    first = np.array([number[name] for name in profile.entries], np.int16)
    unit, starts = visits_together(rng.choice(first, n), following, len(names))
    read, written = np.zeros(unit.size), np.zeros(unit.size)
    calls, seconds = np.ones(unit.size, np.int32), np.full(unit.size, np.nan)
    gaps, before = np.zeros(unit.size), np.zeros(unit.size, bool)
    begins = np.zeros(unit.size, bool)
    begins[starts[:-1]] = True
    for stage, mine in _by_stage(stages, unit):
        if stage.parallelism:
            calls[mine] = rng.choice(np.array(stage.parallelism, np.int32), mine.size)
        read[mine] = _means(rng, stage.input_tokens, calls[mine])
        written[mine] = _means(rng, stage.output_tokens, calls[mine])
        if stage.kind != "llm":
            seconds[mine] = _means(rng, stage.seconds, calls[mine])
        if stage.gap_seconds:
            later = mine[~begins[mine]]
            before[later] = True
            gaps[later] = rng.choice(stage.gap_seconds, later.size)
    units = (
        *(Unit(name, stage.kind) for name, stage in profile.stages.items()),
        *(Unit(f"before {name}", "tool") for name in names),
    )
    return ColumnRuns(
        units,
        _woven(unit, before, unit + len(stages)),
        starts + np.concatenate([[0], np.cumsum(before)])[starts],
        _woven(read, before, 0.0),
        _woven(written, before, 0.0),
        _woven(calls, before, 1),
        _woven(seconds, before, gaps),
    )


def _by_stage(stages: list[StageProfile], at: Ints) -> Iterator[tuple[StageProfile, Ints]]:
    """Each stage with the positions at which it stands."""
    for number, stage in enumerate(stages):
        yield stage, np.flatnonzero(at == number)


def _means(rng: np.random.Generator, samples: tuple[float, ...], calls: Ints) -> Floats:
    """For each number of calls the mean of as many samples; 0 without samples."""
    if not samples or not calls.size:
        return np.zeros(calls.size)
    each = rng.choice(samples, int(calls.sum()))
    return np.add.reduceat(each, np.cumsum(calls) - calls) / calls


def _woven(column: NDArray[N], before: NDArray[np.bool_], other: ArrayLike) -> NDArray[N]:
    """`column` with the value of `other` put before each place that `before` marks."""
    at = np.arange(before.size) + np.cumsum(before)
    woven = np.empty(at.size + int(before.sum()), column.dtype)
    woven[at] = column
    woven[at[before] - 1] = np.broadcast_to(other, before.shape)[before]
    return woven
