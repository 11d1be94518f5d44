"""The nine applications of the Hermes evaluation, as generators of runs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from demand.arguments import whole_number
from demand.errors import DemandError
from demand.graph.pdgraph import PDGraph
from demand.units import END
from demand.workloads.runs import RunGenerator, Stage
from demand.workloads.workload import Application, Workload, poisson_workload


@dataclass(frozen=True)
class _Row:
    weight: float
    mean_seconds: float
    spread: float
    stages: Mapping[str, Stage]
    call_spread: float = 0.1


def hermes_mix(load: float = 0.9, jobs: int = 10_000, seed: int = 0, servers: int = 1) -> Workload:
    """Poisson arrivals of `hermes_applications`, with the weights of the end-to-end mix.

    A mix is a `Workload`, jobs with their arrivals; applications are what such jobs are drawn from,
    here or by `poisson_workload`, `closed_loop` and others.

    The paper drives a real engine with Poisson or Mooncake arrivals; here a job is served whole
    at one second of demand per second (no batching), which isolates the order of service.
    """
    return poisson_workload(hermes_applications(), load, jobs, seed, servers)


def hermes_applications(training_runs: int = 1000, seed: int = 1) -> tuple[Application, ...]:
    """The nine applications: a graph fitted on training runs, true demands from fresh runs.

    From the profiles in the artifact of arXiv 2506.14851: which units follow which, mean tokens
    and calls of each, loop probabilities, tool seconds, weights, the mean and the coefficient of
    variation (cv) of total demand.

    Our choice, where the profiles are silent or disagree with their own totals:

    - tokens of `collapse` (langchain_mapreduce) and of all units of got_docmerge but the first;
      the loops of its scores as p = 1/2 per round; seconds of the container of factool_code;
    - one factor per application on all tokens and seconds, so that mean total demand is the
      table's; it is 0.55 to 0.82 for react_alfw, factool_kbqa, factool_math and react_fever,
      whose stage means add up to more than their totals, and 0.9 to 1.1 for the rest;
    - gamma variables around the means, with one spread per application chosen so that the cv of
      total demand is near the table's; stages are drawn independently of each other.

    Args:
        training_runs: runs each graph is fitted on (about 1000 in the paper).
        seed: of the training runs.
    """
    training_runs = whole_number("training_runs", training_runs, least=1)
    streams = np.random.default_rng(whole_number("seed", seed, least=0)).spawn(len(_TABLE))
    applications = []
    for (name, row), rng in zip(_TABLE.items(), streams, strict=True):
        generator = hermes_generator(name)
        graph = PDGraph.fit((generator.run(rng) for _ in range(training_runs)), name=name)
        applications.append(
            Application(
                name,
                graph.remaining(),
                mean_seconds=row.mean_seconds,
                weight=row.weight,
                graph=graph,
                sample_runs=generator.runs,
            )
        )
    return tuple(applications)


def hermes_generator(name: str) -> RunGenerator:
    """The generator of runs of one of the nine applications.

    Raises:
        DemandError: a name that is none of theirs.
    """
    if name not in _TABLE:
        raise DemandError(f"application is {name!r}; expected one of {', '.join(_TABLE)}")
    row = _TABLE[name]
    plain = RunGenerator(row.stages, spread=row.spread, call_spread=row.call_spread)
    return replace(plain, scale=row.mean_seconds / plain.mean_seconds())


def _llm(
    input_tokens: float, output_tokens: float, then: Mapping[str, float], calls: float = 1.0
) -> Stage:
    return Stage("llm", then, (input_tokens, output_tokens), calls)


_TABLE: dict[str, _Row] = {
    "got_docmerge": _Row(
        weight=2,
        mean_seconds=2030.0,
        spread=0.2,  # cv of total demand 0.35
        stages={
            "generate": _llm(1562, 963, {"score": 1.0}, calls=2),
            "score": _llm(1600, 280, {"score": 0.5, "aggregate": 0.5}, calls=20),
            "aggregate": _llm(1562, 963, {"rescore": 1.0}, calls=2),
            "rescore": _llm(1600, 280, {"rescore": 0.5, "improve": 0.5}, calls=20),
            "improve": _llm(1562, 963, {"final_score": 1.0}),
            "final_score": _llm(1600, 280, {END: 1.0}, calls=20),
        },
    ),
    "langchain_mapreduce": _Row(
        weight=16,
        mean_seconds=313.0,
        spread=0.3,  # cv of total demand 0.27
        stages={
            "map": _llm(425, 185, {"collapse": 0.86, "final": 0.14}, calls=21),
            "collapse": _llm(1000, 230, {"collapse": 0.16, "final": 0.84}, calls=2.6),
            "final": _llm(1463, 706, {END: 1.0}),
        },
    ),
    "hugginggpt": _Row(
        weight=10,
        mean_seconds=61.0,
        spread=0.5,  # cv of total demand 0.31
        stages={
            "plan": _llm(1868, 102, {"task_model": 1.0}),
            "task_model": Stage("model", {"respond": 1.0}, seconds=25.0),
            "respond": _llm(572, 458, {END: 1.0}),
        },
    ),
    "code_feedback": _Row(
        weight=16,
        mean_seconds=58.0,
        spread=1.1,  # cv of total demand 0.96
        stages={
            "write": _llm(678, 227, {"test": 1.0}),
            "test": Stage("container", {"write": 0.55, END: 0.45}, seconds=12.3),
        },
    ),
    "factool_kbqa": _Row(
        weight=16,
        mean_seconds=41.0,
        spread=0.25,  # cv of total demand 0.22
        stages={
            "claims": _llm(742, 103, {"queries": 1.0}),
            "queries": _llm(369, 23, {"search": 1.0}, calls=5.1),
            "search": Stage("search", {"verify": 1.0}, seconds=1.5),
            "verify": _llm(585, 169, {END: 1.0}, calls=5.1),
        },
    ),
    "factool_code": _Row(
        weight=16,
        mean_seconds=38.0,
        spread=0.15,  # cv of total demand 0.13
        call_spread=0.0,
        stages={
            "queries": _llm(372, 71, {"solutions": 1.0}),
            "solutions": _llm(326, 197, {"execute": 1.0}, calls=3),
            "execute": Stage("container", {END: 1.0}, seconds=0.5),
        },
    ),
    "react_alfw": _Row(
        weight=16,
        mean_seconds=9.5,
        spread=0.3,  # cv of total demand 0.94
        stages={"thought": _llm(2040, 14, {"thought": 0.94, END: 0.06})},
    ),
    "factool_math": _Row(
        weight=4,
        mean_seconds=8.9,
        spread=0.2,  # cv of total demand 0.17
        stages={
            "claims": _llm(838, 97, {"queries": 1.0}),
            "queries": _llm(267, 29, {END: 1.0}, calls=2.9),
        },
    ),
    "react_fever": _Row(
        weight=4,
        mean_seconds=6.5,
        spread=0.6,  # cv of total demand 0.90
        stages={
            "thought": _llm(1168, 39, {"search": 0.54, END: 0.46}),
            "search": Stage("search", {"thought": 1.0}, seconds=2.2),
        },
    ),
}
