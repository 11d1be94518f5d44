"""What knowing_demand.py serves: recorded runs, split by time, and how well they are labelled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from refinement import data_sets

from demand import Application, Distribution, Workload, poisson_workload, recorded_applications
from demand.traces import (
    Request,
    read_azure,
    read_hermes_artifact,
    read_mooncake,
    read_tau_bench,
)
from demand.units import Execution
from demand.workloads import hermes_applications, profiled_applications, with_arrivals

Run = list[Execution]
NO_LABELS = "none"
SIZES = {"got_docmerge": "large", "langchain_mapreduce": "medium", "hugginggpt": "medium"}
"""As the artifact's mix has them: 2 % large, 26 % medium, and the others small."""


@dataclass(frozen=True)
class Mix:
    """Jobs, and the labels by which a scheduler may tell them apart.

    Args:
        name: of the mix.
        applications: as finely as they can be told apart.
        labels: names of labellings, and the label that each gives an application.
        times: of arrivals as recorded, in place of Poisson ones.
    """

    name: str
    applications: Sequence[Application]
    labels: Mapping[str, Callable[[str], str]]
    times: Sequence[float] = ()

    def known(self, labelling: str) -> dict[str, Distribution]:
        """What is known of each label: of its applications, by their shares of the arrivals."""
        label = self.labels[labelling]
        members: dict[str, list[Application]] = {}
        for application in self.applications:
            members.setdefault(label(application.name), []).append(application)
        return {name: _pooled(each) for name, each in members.items()}

    def draw(self, labelling: str, load: float, jobs: int, *, seed: int) -> Workload:
        """The same jobs of a seed under every labelling."""
        drawn = poisson_workload(self.applications, load, jobs, seed)
        if self.times:
            drawn = with_arrivals(drawn, self.times)
        labels = [self.labels[labelling](name) for name in drawn.applications]
        known = self.known(labelling)
        return replace(drawn, applications=labels, tenants=labels, distributions=known, graphs={})


def mixes(folder: Path) -> Iterator[Mix]:
    """Those of the data that are there."""
    halves: dict[str, tuple[list[Run], list[Run]]] = {}
    for name, data in data_sets(folder):
        earlier, later = data.by_time()
        halves[name] = [r for task in earlier for r in task], [r for task in later for r in task]
    agents = [name for name in ("coding agents", "ReAct gpt35", "ReAct llama2_7b")
              if name in halves]  # fmt: skip
    for name in agents:
        yield unlabelled(name, *halves[name])
    yield from tau_bench(folder)
    if {"ReAct gpt35", "ReAct llama2_7b"} <= set(halves):
        learned, served = halves["ReAct gpt35"][0], halves["ReAct llama2_7b"][1]
        yield unlabelled("ReAct llama2_7b, learned from gpt35", learned, served)
    mixed = [*agents, "tau-bench, later trials"]
    if set(mixed) <= set(halves):
        applications = recorded_applications(
            train={name: halves[name][0] for name in mixed},
            test={name: halves[name][1] for name in mixed},
        )
        labels = {"agent (4)": str, NO_LABELS: _nothing}
        yield Mix("agents of four kinds", applications, labels)
    yield from requests(folder)
    yield from artifact(folder)


def unlabelled(name: str, learned: list[Run], served: list[Run]) -> Mix:
    """Runs that nothing tells apart."""
    applications = recorded_applications(train={name: learned}, test={name: served})
    return Mix(name, applications, {NO_LABELS: _nothing})


def tau_bench(folder: Path) -> Iterator[Mix]:
    """By task: the later trials of a task are served, the earlier ones known."""
    path = folder / "tau_bench" / "gpt-4o-airline.jsonl.gz"
    if not path.exists():
        return
    sessions = list(read_tau_bench(path))
    halves: tuple[dict[str, list[Run]], dict[str, list[Run]]] = ({}, {})
    for at, session in enumerate(sessions):
        side = halves[2 * at >= len(sessions)]
        run = session.run(leave_out=("human",), assumed_seconds={"tool": 0.5})
        side.setdefault(str(session.attributes["task"]), []).append(run)
    both = [task for task in halves[0] if task in halves[1]]
    train, test = ({task: side[task] for task in both} for side in halves)
    labels = {f"task ({len(both)})": str, NO_LABELS: _nothing}
    yield Mix("tau-bench, later trials", recorded_applications(train=train, test=test), labels)


def requests(folder: Path) -> Iterator[Mix]:
    """Single requests, told apart by service and by the length of the prompt, which is known."""
    azure = folder / "azure_llm_2023"
    if azure.exists():
        services = {
            name: list(read_azure(azure / f"{name}.first60pct.csv")) for name in ("code", "conv")
        }
        applications = by_prompt(services, 4)
        labels = {
            "service and prompt (8)": str,
            "service (2)": lambda name: name.split()[0],
            NO_LABELS: _nothing,
        }
        yield Mix("Azure requests", applications, labels)
        times = [request.arrival_seconds for request in later(services["conv"])]
        yield Mix("Azure requests, recorded arrivals", applications, labels, times)
    mooncake = folder / "mooncake"
    if mooncake.exists():
        applications = by_prompt({"conversation": list(read_mooncake(mooncake))}, 8)
        labels = {"prompt (8)": str, NO_LABELS: _nothing}
        yield Mix("Mooncake requests", applications, labels)


def later(recorded: list[Request]) -> list[Request]:
    return recorded[len(recorded) // 2 :]


def by_prompt(services: dict[str, list[Request]], groups: int) -> Sequence[Application]:
    """Requests of each service in groups of like prompts; bounds are of the earlier half."""
    train: dict[str, list[Run]] = {}
    test: dict[str, list[Run]] = {}
    for service, recorded in services.items():
        served = [request for request in recorded if request.output_tokens]
        half = len(served) // 2
        bounds = np.quantile(
            [request.input_tokens for request in served[:half]], np.arange(1, groups) / groups
        )
        for at, request in enumerate(served):
            group = int(np.searchsorted(bounds, request.input_tokens))
            side = train if at < half else test
            side.setdefault(f"{service} {group}", []).append(request.run())
    both = [name for name in train if name in test]
    return recorded_applications(
        train={name: train[name] for name in both}, test={name: test[name] for name in both}
    )


def artifact(folder: Path) -> Iterator[Mix]:
    """The nine applications of Hermes from its samples, which have no times to split by."""
    path = folder / "hermes_artifact" / "pdgraphs.json.gz"
    if not path.exists():
        return
    weights = {application.name: application.weight for application in hermes_applications(1)}
    applications = profiled_applications(read_hermes_artifact(path), weights=weights)
    labels = {
        "application (9)": str,
        "size (3)": lambda name: SIZES.get(name, "small"),
        NO_LABELS: _nothing,
    }
    yield Mix("Hermes artifact", applications, labels)


def _nothing(_: str) -> str:
    return "any"


def _pooled(applications: Sequence[Application]) -> Distribution:
    return Distribution(
        np.concatenate([a.distribution.values for a in applications]),
        np.concatenate([a.weight * a.distribution.weights for a in applications]),
    )


def drawing(mix: Mix, labelling: str, load: float, jobs: int) -> Callable[..., Workload]:
    """For `compare`."""
    return partial(mix.draw, labelling, load, jobs)
