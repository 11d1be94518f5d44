"""What schedule.py compares: policies, and workloads to compare them on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from demand import Workload, bimodal_applications, poisson_workload
from demand.policies import (
    EDF,
    FCFS,
    LAS,
    SERPT,
    VTC,
    Aging,
    ClassMean,
    DeadlineMix,
    Gittins,
    Hysteresis,
    LeastSlack,
    Oracle,
    Policy,
    RandomOrder,
    RequestFCFS,
    TimeSlice,
    VirtualTime,
)
from demand.simulation.engine import Engine
from demand.traces import read_agent_sessions, read_azure, read_mooncake
from demand.units import Execution
from demand.workloads import (
    Application,
    heavy_tailed_applications,
    recorded_applications,
    with_arrivals,
    with_deadlines,
)

NOTHING, KNOWN, TRUTH = "nothing", "distribution", "truth"
SWEPT = ("request FCFS", "FCFS", "LAS", "class mean", "SERPT", "Gittins", "oracle")
ENGINE_REQUESTS = 32
ENGINE_JOBS = 400


@dataclass(frozen=True)
class Arm:
    """A policy under a name, and what it knows of a job's demand."""

    name: str
    policy: Policy
    knows: str


@dataclass(frozen=True)
class Scenario:
    """A workload for every seed.

    Args:
        name: of the scenario.
        title: over its table and its panel.
        unit: mean demand of its jobs, seconds.
        draw: the workload of a seed.
        timed: whether it has deadlines.
        engine: that serves it in batches; `None` for one server that serves whole jobs.
    """

    name: str
    title: str
    unit: float
    draw: Callable[..., Workload]
    timed: bool = False
    engine: Engine | None = None

    def arms(self) -> list[Arm]:
        """The policies; on an engine a few of them."""
        chosen = policies(self.unit, self.timed)
        few = (*SWEPT, "Gittins, hysteresis")
        return chosen if self.engine is None else [arm for arm in chosen if arm.name in few]


def policies(unit: float, timed: bool) -> list[Arm]:
    """Quanta and margins are shares of the mean demand, `unit` seconds."""
    every = [
        Arm("random", RandomOrder(), NOTHING),
        Arm("request FCFS", RequestFCFS(), NOTHING),  # FCFS where there are no units
        Arm("FCFS", FCFS(), NOTHING),
        Arm("LAS", LAS(quantum=unit / 5), NOTHING),
        Arm("VTC", VTC(quantum=unit / 5), NOTHING),
        Arm("class mean", ClassMean(), KNOWN),
        Arm("virtual time", VirtualTime(), KNOWN),
        Arm("SERPT", SERPT(), KNOWN),
        Arm("Gittins", Gittins(), KNOWN),
        Arm("Gittins, Hermes artifact", Gittins(variant="hermes_artifact"), KNOWN),
        Arm("Gittins, quantum", TimeSlice(Gittins(), unit / 5), KNOWN),
        Arm("Gittins, hysteresis", Hysteresis(Gittins(), unit / 5), KNOWN),
        Arm("Gittins, aging", Aging(Gittins(), cap=20 * unit, rate=0.1), KNOWN),
        Arm("oracle", Oracle(), TRUTH),
    ]
    worst, usual = LeastSlack(quantum=unit / 5), LeastSlack(0.9, unit / 5)
    due = [
        Arm("EDF", EDF(), NOTHING),
        Arm("least slack, worst case", worst, KNOWN),
        Arm("least slack, 0.9-quantile", usual, KNOWN),
        Arm("EDF, then Gittins", DeadlineMix(EDF(), Gittins()), KNOWN),
        Arm("least slack, then Gittins", DeadlineMix(usual, Gittins()), KNOWN),
    ]
    return every + due if timed else every


def scenarios(
    hermes: Sequence[Application], load: float, jobs: int, traces: Path | None
) -> list[Scenario]:
    """Those that can be drawn from what is at hand; `hermes` are its nine applications."""

    def poisson(
        name: str, title: str, applications: Sequence[Application], load: float
    ) -> Scenario:
        drawn = partial(poisson_workload, applications, load, jobs)
        return Scenario(name, f"{title}, load {load}", mean_seconds(applications), drawn)

    mix = poisson("hermes", "Hermes mix", hermes, load)
    mixes = [
        mix,
        poisson("bimodal", "Bimodal", bimodal_applications(), 0.8),
        poisson("lognormal", "Lognormal tail", heavy_tailed_applications("lognormal"), 0.8),
        poisson("pareto", "Pareto tail", heavy_tailed_applications("pareto"), 0.8),
    ]
    engines = [
        replace(
            mix,
            name=f"hermes_engine_{left_out}",
            title=f"Hermes mix, engine of {ENGINE_REQUESTS} requests,\n{says}, load {load}",
            draw=partial(poisson_workload, hermes, load, ENGINE_JOBS, servers=ENGINE_REQUESTS),
            engine=Engine(max_requests=ENGINE_REQUESTS, preemption=left_out),
        )
        for left_out, says in (("none", "nobody displaced"), ("recompute", "KV computed again"))
    ]
    with_due = replace(
        mix,
        name="hermes_deadlines",
        title=f"{mix.title}, half of the jobs due\nat twice their demand",
        draw=lambda seed: with_deadlines(mix.draw(seed=seed), 2.0, share=0.5, seed=seed),
        timed=True,
    )
    if traces is None:
        return [*mixes, *engines, with_due]
    azure = traces / "azure_llm_2023"
    rhythms = {
        "mooncake": ("Mooncake intervals, resampled", read_mooncake(traces / "mooncake")),
        "azure_code": ("Azure code arrivals", read_azure(azure / "code.first60pct.csv")),
        "azure_conv": ("Azure conversation arrivals", read_azure(azure / "conv.first60pct.csv")),
    }
    sessions = recorded_applications({"coding_agent": agent_runs(traces)}, split="time")
    recorded = [
        replace(
            mix,
            name=f"hermes_{name}",
            title=f"{mix.title},\n{says}",
            draw=partial(
                in_rhythm,
                mix,
                [request.arrival_seconds for request in requests],
                "resampled" if name == "mooncake" else "recorded",
            ),
        )
        for name, (says, requests) in rhythms.items()
    ]
    recorded.append(poisson("agent_sessions", "Coding-agent sessions", sessions, load))
    return [*mixes, *recorded, *engines, with_due]


def in_rhythm(scenario: Scenario, times: list[float], order: str, *, seed: int) -> Workload:
    """Resampled intervals are Hermes' way; the recorded order keeps bursts, alike for all seeds."""
    return with_arrivals(scenario.draw(seed=seed), times, order, seed)


def mean_seconds(applications: Sequence[Application]) -> float:
    """Of a job, over applications by weight."""
    means = [application.true_mean_seconds for application in applications]
    return float(np.average(means, weights=[application.weight for application in applications]))


def agent_runs(traces: Path) -> list[list[Execution]]:
    """Seconds in the model as measured, the median where a call has none; nothing else counts."""
    sessions = list(read_agent_sessions(traces / "agent_sessions"))
    measured = [s.seconds for session in sessions for s in session.spans if s.kind == "llm"]
    median = float(np.median([seconds for seconds in measured if seconds is not None]))
    return [
        session.run(leave_out=("human",), llm="measured", assumed_seconds={"llm": median})
        for session in sessions
    ]
