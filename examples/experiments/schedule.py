"""Every scheduling policy on every workload, with paired seeds and bootstrap intervals.

    python examples/experiments/schedule.py --out docs/results
    python examples/experiments/schedule.py --out out --traces FOLDER --seeds 40

Serves the applications of Hermes (arXiv 2506.14851), mixes on which knowing the distribution pays
or does not, and recorded coding-agent sessions: one server that serves whole jobs and preempts at
no cost; the Hermes mix also in a continuous-batching engine. All policies serve the same jobs of a
seed; intervals are over seeds. With `--traces`, a folder that holds `agent_sessions/`, `mooncake/`
and `azure_llm_2023/` (docs/traces.md), recorded sessions and arrivals are served too. Writes
`scheduling.json` and `scheduling.png`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

from environment import environment
from schedule_arms import ENGINE_JOBS, SWEPT, Arm, Scenario, mean_seconds, policies, scenarios
from schedule_figure import figure
from workers import add_workers

from demand import (
    Application,
    Comparison,
    compare,
    hermes_applications,
    paired_ratio_interval,
    poisson_workload,
)
from demand.compare import FURTHER, FURTHER_OF_ENGINE

LOADS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
COMPARED = ("mean_seconds", "p95_seconds", "p99_seconds")
BASELINES = ("FCFS", "request FCFS", "class mean", "oracle")


def compared(scenario: Scenario, arms: Sequence[Arm], seeds: int, workers: int | str) -> list[dict]:
    """A row for each policy: figures over seeds, and ratios to the baselines."""
    print(scenario.name)
    result = compare(
        scenario.draw,
        {arm.name: arm.policy for arm in arms},
        range(seeds),
        engine=scenario.engine,
        also=[*FURTHER, *(FURTHER_OF_ENGINE if scenario.engine else ())],
        workers=workers,
    )
    return [row(arm, result) for arm in arms]


def row(arm: Arm, result: Comparison) -> dict:
    """Figures of one policy with their intervals; what a workload does not have is left out."""
    figures = {name: interval._asdict() for name, interval in result[arm.name].items()}
    ratios = {
        f"{name}_over_{baseline.replace(' ', '_').lower()}": paired_ratio_interval(
            result.measured[arm.name][name], result.measured[baseline][name]
        )._asdict()
        for name, baseline in product(COMPARED, BASELINES)
    }
    return {"policy": arm.name, "knows": arm.knows, **figures, **ratios}


def against_load(
    applications: Sequence[Application], jobs: int, seeds: int, workers: int | str
) -> list[dict]:
    """The same jobs, arriving faster."""
    unit = mean_seconds(applications)
    arms = [arm for arm in policies(unit, timed=False) if arm.name in SWEPT]
    swept = []
    for load in LOADS:
        drawn = partial(poisson_workload, applications, load, jobs)
        scenario = Scenario(f"hermes {load}", f"Hermes mix, load {load}", unit, drawn)
        swept.append({"load": load, "rows": compared(scenario, arms, seeds, workers)})
    return swept


def claim(rows: list[dict]) -> dict:
    """How far below the baselines Gittins and class mean come."""
    named = {row["policy"]: row for row in rows}
    found: dict = {}
    for name, baseline in product(COMPARED, ("request_fcfs", "fcfs")):
        ratio = f"{name}_over_{baseline}"
        gittins, known = named["Gittins"][ratio], named["class mean"][ratio]
        found[ratio] = {
            "reduction_by_gittins": 1.0 - gittins["estimate"],
            "interval": [1.0 - gittins["high"], 1.0 - gittins["low"]],
            "reduction_by_class_mean": 1.0 - known["estimate"],
        }
    return found


def table(scenario: dict) -> str:
    """As Markdown."""
    extra = {"deadline_hits": ("deadlines met", ".1%"),
             "prefilled_again": ("tokens prefilled again", ",.0f")}  # fmt: skip
    extra = {name: said for name, said in extra.items() if name in scenario["rows"][0]}
    heads = ["mean s", "of FCFS", "P50 s", "P95 s", "P99 s", "slowdown", "Jain", "preemptions",
             *(head for head, _ in extra.values())]  # fmt: skip
    lines = [
        f"\n{' '.join(scenario['title'].split())}\n",
        f"| policy | {' | '.join(heads)} |",
        "| --- |" + " ---: |" * len(heads),
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
            *(format(value[name], form) for name, (_, form) in extra.items()),
        ]
        lines.append(f"| {row['policy']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims_table(claims: dict[str, dict]) -> str:
    """As Markdown: Gittins below the baselines, and class mean in brackets."""
    heads = [name.replace("_seconds", "").replace("_", " ") for name in next(iter(claims.values()))]
    lines = [
        "\nReduction by Gittins (by class mean) on the Hermes mix\n",
        f"| | {' | '.join(heads)} |",
        "| --- |" + " ---: |" * len(heads),
    ]
    for where, found in claims.items():
        cells = [
            f"{each['reduction_by_gittins']:.1%} ({each['reduction_by_class_mean']:.1%})"
            for each in found.values()
        ]
        lines.append(f"| {where} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gains_table(scenarios: list[dict]) -> str:
    """As Markdown: mean completion time over that of class mean, by scenario and policy."""
    compared = ("FCFS", "LAS", "SERPT", "Gittins, Hermes artifact", "Gittins", "oracle")
    lines = [
        "\nMean completion time over that of class mean\n",
        f"| | {' | '.join(compared)} |",
        "| --- |" + " ---: |" * len(compared),
    ]
    for scenario in scenarios:
        rows = {row["policy"]: row["mean_seconds_over_class_mean"] for row in scenario["rows"]}
        cells = [
            f"{rows[name]['estimate']:.2f} ({rows[name]['low']:.2f} to {rows[name]['high']:.2f})"
            if name in rows
            else ""
            for name in compared
        ]
        lines.append(f"| {' '.join(scenario['title'].split())} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--traces", type=Path, help="folder of recorded traces, see above")
    parser.add_argument("--jobs", type=int, default=2000, help="jobs of a run on one server")
    parser.add_argument("--seeds", type=int, default=15, help="runs of a policy on a workload")
    parser.add_argument("--load", type=float, default=0.9, help="of Hermes' mix and of sessions")
    again = "scenarios to measure alone; the rest is what the record in --out has"
    parser.add_argument("--again", nargs="+", default=[], help=again)
    add_workers(parser)
    args = parser.parse_args()
    begun = time.perf_counter()
    hermes = hermes_applications()
    chosen = scenarios(hermes, args.load, args.jobs, args.traces)
    path = args.out / "scheduling.json"
    before = json.loads(path.read_text()) if args.again else {}
    kept = {each["name"]: each for each in before.get("scenarios", ())}
    results = [
        {
            "name": scenario.name,
            "title": scenario.title,
            "mean_demand_seconds": scenario.unit,
            "rows": compared(scenario, scenario.arms(), args.seeds, args.workers),
        }
        if not args.again or scenario.name in args.again
        else kept[scenario.name]
        for scenario in chosen
    ]
    swept = (
        before["loads"] if args.again else against_load(hermes, args.jobs, args.seeds, args.workers)
    )
    claims = {f"load {each['load']}": claim(each["rows"]) for each in swept} | {
        each["name"]: claim(each["rows"]) for each in results if "engine" in each["name"]
    }
    record = {
        "configuration": {
            "jobs": args.jobs,
            "engine_jobs": ENGINE_JOBS,
            "seeds": list(range(args.seeds)),
            "load": args.load,
            "traces": ["agent_sessions", "azure_llm_2023", "mooncake"] if args.traces else [],
            "engines": {s.name: vars(s.engine) for s in chosen if s.engine is not None},
        },
        "environment": before.get("environment", environment()),
        "measured_again": {name: environment() for name in args.again},
        "claims": claims,
        "scenarios": results,
        "loads": swept,
        "seconds": before.get("seconds", time.perf_counter() - begun),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scheduling.json").write_text(json.dumps(record, indent=1) + "\n")
    figure(record, args.out / "scheduling.png")
    for scenario in results:
        print(table(scenario))
    print(gains_table(results))
    print(claims_table(claims))
    print(f"\n{record['seconds']:.0f} s; wrote {args.out / 'scheduling.json'} and .png")


if __name__ == "__main__":
    main()
