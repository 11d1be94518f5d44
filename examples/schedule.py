"""Every scheduling policy on every workload, with paired seeds and bootstrap intervals.

    python examples/schedule.py --out docs/results
    python examples/schedule.py --out out --traces FOLDER --seeds 20

Serves the applications of Hermes (arXiv 2506.14851), mixes on which knowing the distribution pays
or does not, and recorded coding-agent sessions, one server, preemption at no cost. All policies
serve the same jobs of a seed; intervals are over seeds. With `--traces`, a folder that holds
`agent_sessions/` and `mooncake/` as docs/traces.md describes them, recorded sessions and arrivals
are served too. Writes `scheduling.json` and `scheduling.png`.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from environment import environment
from schedule_figure import figure
from tqdm import tqdm

from demand import (
    Workload,
    bimodal_applications,
    bootstrap_interval,
    hermes_applications,
    paired_ratio_interval,
    poisson_workload,
    simulate,
)
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
    Quantum,
    RandomOrder,
    RequestFCFS,
    VirtualTime,
)
from demand.traces import read_agent_sessions, read_mooncake
from demand.workloads import (
    Application,
    heavy_tailed_applications,
    recorded_applications,
    with_arrivals,
    with_deadlines,
)

FIGURES = ("mean_seconds", "p50_seconds", "p95_seconds", "p99_seconds", "mean_slowdown",
           "p99_slowdown", "jain", "preemptions", "deadline_hits")  # fmt: skip
COMPARED = ("mean_seconds", "p95_seconds", "p99_seconds")
BASELINES = ("FCFS", "request FCFS", "class mean", "oracle")
LOADS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SWEPT = ("FCFS", "request FCFS", "LAS", "class mean", "Gittins", "oracle")
NOTHING, KNOWN, TRUTH = "nothing", "distribution", "truth"


@dataclass(frozen=True)
class Arm:
    """A policy under a name, and what it knows of a job's demand."""

    name: str
    policy: Policy
    knows: str


@dataclass(frozen=True)
class Scenario:
    """A workload for every seed: of mean demand `unit` seconds; `timed` if it has deadlines."""

    name: str
    title: str
    unit: float
    draw: Callable[..., Workload]
    timed: bool = False


def mean_seconds(applications: Sequence[Application]) -> float:
    """Of a job, over applications by weight."""
    return float(np.average([a.true_mean_seconds for a in applications],
                            weights=[a.weight for a in applications]))  # fmt: skip


def arms(unit: float, timed: bool) -> list[Arm]:
    """The policies; quanta and margins are shares of the mean demand, `unit` seconds."""
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
        Arm("Gittins, quantum", Quantum(Gittins(), unit / 5), KNOWN),
        Arm("Gittins, hysteresis", Hysteresis(Gittins(), unit / 5), KNOWN),
        Arm("Gittins, aging", Aging(Gittins(), cap=20 * unit, rate=0.1), KNOWN),
        Arm("oracle", Oracle(), TRUTH),
    ]
    due = [
        Arm("EDF", EDF(), NOTHING),
        Arm("least slack, worst case", LeastSlack(quantum=unit / 5), KNOWN),
        Arm("least slack, 0.9-quantile", LeastSlack(0.9, unit / 5), KNOWN),
        Arm("EDF, then Gittins", DeadlineMix(EDF(), Gittins()), KNOWN),
        Arm(
            "least slack, then Gittins",
            DeadlineMix(LeastSlack(0.9, unit / 5), Gittins()),
            KNOWN,
        ),
    ]
    return every + due if timed else every


def scenarios(args: argparse.Namespace, applications: Sequence[Application]) -> list[Scenario]:
    """Those that can be drawn from what is at hand; `applications` are those of Hermes."""

    def poisson(
        name: str, title: str, applications: Sequence[Application], load: float
    ) -> Scenario:
        return Scenario(
            name,
            f"{title}, load {load}",
            mean_seconds(applications),
            partial(poisson_workload, applications, load, args.jobs),
        )

    hermes = poisson("hermes", "Hermes mix", applications, args.load)
    mixes = [
        poisson("bimodal", "Bimodal", bimodal_applications(), 0.8),
        poisson("lognormal", "Lognormal tail", heavy_tailed_applications("lognormal"), 0.8),
        poisson("pareto", "Pareto tail", heavy_tailed_applications("pareto"), 0.8),
    ]
    with_due = replace(
        hermes,
        name="hermes_deadlines",
        title=f"{hermes.title}, half of the jobs due\nat twice their demand",
        draw=lambda seed: with_deadlines(hermes.draw(seed=seed), 2.0, share=0.5, seed=seed),
        timed=True,
    )
    if args.traces is None:
        return [hermes, *mixes, with_due]
    times = [r.arrival_seconds for r in read_mooncake(args.traces / "mooncake")]
    sessions = recorded_applications({"coding_agent": agent_runs(args.traces)})
    recorded = [
        replace(
            hermes,
            name="hermes_mooncake",
            title=f"{hermes.title},\nMooncake arrivals",
            draw=lambda seed: with_arrivals(hermes.draw(seed=seed), times, "resampled", seed),
        ),
        poisson("agent_sessions", "Coding-agent sessions", sessions, 0.9),
    ]
    return [hermes, *recorded, *mixes, with_due]


def agent_runs(traces: Path) -> list:
    """Seconds in the model as measured, the median where a call has none; nothing else counts."""
    sessions = list(read_agent_sessions(traces / "agent_sessions"))
    measured = [s.seconds for session in sessions for s in session.spans if s.kind == "llm"]
    median = float(np.median([seconds for seconds in measured if seconds is not None]))
    return [
        session.run(leave_out=("human",), llm="measured", assumed_seconds={"llm": median})
        for session in sessions
    ]


def serve(scenario: Scenario, chosen: list[Arm], seeds: int, progress: tqdm) -> list[dict]:
    """A row for each policy: figures over seeds, and ratios to the baselines."""
    runs: dict[Arm, list[dict]] = {}
    for seed in range(seeds):
        workload = scenario.draw(seed=seed)
        for arm in chosen:
            progress.set_postfix_str(f"{scenario.name}, {arm.name}")
            result = simulate(workload, arm.policy, seed=seed)
            runs.setdefault(arm, []).append(result.summary())
            progress.update()
    columns = {
        arm.name: {figure: [run[figure] for run in of_arm] for figure in FIGURES}
        for arm, of_arm in runs.items()
    }
    return [row(arm, columns) for arm in runs]


def row(arm: Arm, columns: dict[str, dict[str, list[float]]]) -> dict:
    """Figures of one policy with their intervals; what a workload does not have is left out."""
    mine = columns[arm.name]
    figures = {
        figure: bootstrap_interval(values)._asdict()
        for figure, values in mine.items()
        if np.isfinite(values).all()
    }
    ratios = {
        f"{figure}_over_{baseline.replace(' ', '_').lower()}": paired_ratio_interval(
            mine[figure], columns[baseline][figure]
        )._asdict()
        for figure, baseline in product(COMPARED, BASELINES)
    }
    return {"policy": arm.name, "knows": arm.knows, **figures, **ratios}


def loads(
    args: argparse.Namespace, applications: Sequence[Application], progress: tqdm
) -> list[dict]:
    """The mix of `applications` at every load: the same jobs, arriving faster."""
    unit = mean_seconds(applications)
    chosen = [arm for arm in arms(unit, timed=False) if arm.name in SWEPT]
    swept = []
    for load in LOADS:
        scenario = Scenario(
            f"hermes {load}", "", unit, partial(poisson_workload, applications, load, args.jobs)
        )
        swept.append({"load": load, "rows": serve(scenario, chosen, args.seeds, progress)})
    return swept


def claim(rows: list[dict]) -> dict:
    """How much less than FCFS, application- and request-level, and what of it class mean has."""
    named = {row["policy"]: row for row in rows}
    found: dict = {}
    for measure, baseline in product(COMPARED, ("fcfs", "request_fcfs")):
        ratio = f"{measure}_over_{baseline}"
        gittins, known = (named[name][ratio] for name in ("Gittins", "class mean"))
        found[ratio] = {
            "reduction_by_gittins": 1.0 - gittins["estimate"],
            "interval": [1.0 - gittins["high"], 1.0 - gittins["low"]],
            "reduction_by_class_mean": 1.0 - known["estimate"],
        }
    return found


def table(scenario: dict) -> str:
    """As Markdown."""
    due = "deadline_hits" in scenario["rows"][0]
    heads = ["mean s", "of FCFS", "P50 s", "P95 s", "P99 s", "slowdown", "Jain", "preemptions"]
    lines = [
        f"\n{' '.join(scenario['title'].split())}\n",
        f"| policy | {' | '.join(heads)} |{' deadlines met |' if due else ''}",
        "| --- |" + " ---: |" * (len(heads) + due),
    ]
    for row in scenario["rows"]:
        value = {key: entry["estimate"] for key, entry in row.items() if isinstance(entry, dict)}
        ratio = row["mean_seconds_over_fcfs"]
        cells = [
            f"{value['mean_seconds']:.1f}",
            f"{ratio['estimate']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})",
            *(f"{value[f'p{q}_seconds']:.1f}" for q in (50, 95, 99)),
            f"{value['mean_slowdown']:.1f}",
            f"{value['jain']:.2f}",
            f"{value['preemptions']:.0f}",
            *([f"{value['deadline_hits']:.1%}"] if due else []),
        ]
        lines.append(f"| {row['policy']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--traces", type=Path, help="folder of agent_sessions/ and mooncake/")
    parser.add_argument("--jobs", type=int, default=2000, help="jobs of a run")
    parser.add_argument("--seeds", type=int, default=20, help="runs of a policy on a workload")
    parser.add_argument("--load", type=float, default=0.9, help="of the Hermes mix")
    args = parser.parse_args()
    begun = time.perf_counter()
    applications = hermes_applications()
    chosen = [(s, arms(s.unit, s.timed)) for s in scenarios(args, applications)]
    runs = (sum(len(policies) for _, policies in chosen) + len(LOADS) * len(SWEPT)) * args.seeds
    with tqdm(total=runs) as progress:
        served = [
            {
                "name": scenario.name,
                "title": scenario.title,
                "mean_demand_seconds": scenario.unit,
                "rows": serve(scenario, policies, args.seeds, progress),
            }
            for scenario, policies in chosen
        ]
        swept = loads(args, applications, progress)
    record = {
        "configuration": {
            "jobs": args.jobs,
            "seeds": args.seeds,
            "load": args.load,
            "traces": ["agent_sessions", "mooncake"] if args.traces else [],
        },
        "environment": environment(),
        "claim": [{"load": each["load"], **claim(each["rows"])} for each in swept],
        "scenarios": served,
        "loads": swept,
        "seconds": time.perf_counter() - begun,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scheduling.json").write_text(json.dumps(record, indent=1) + "\n")
    figure(record, args.out / "scheduling.png")
    for scenario in served:
        print(table(scenario))
    print("\nHermes mix: Gittins (class mean) below FCFS, and below request FCFS\n")
    print("| load |" + "".join(f" {name} |" for name in record["claim"][0] if name != "load"))
    print("| ---: |" + " ---: |" * 2 * len(COMPARED))
    for each in record["claim"]:
        cells = [
            f" {f['reduction_by_gittins']:.1%} ({f['reduction_by_class_mean']:.1%}) |"
            for f in each.values()
            if isinstance(f, dict)
        ]
        print(f"| {each['load']} |" + "".join(cells))
    print(f"\n{record['seconds']:.0f} s; wrote {args.out / 'scheduling.json'} and .png")


if __name__ == "__main__":
    main()
