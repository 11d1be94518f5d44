"""What may be had from attained service alone: LAS, forgetting it, and queues with promotion.

    python examples/experiments/attained.py --out docs/results

Policies that know nothing of demand, on workloads at load 0.9 and one preemptive server: the
bimodal mix, the mix of the Hermes paper by its table, and real coding agents (the later half of
the sessions, human time left out). Beside the mean, the 99th percentile of completion and the
largest slowdown say what it costs the longest. Ratios are to first come, first served on the same
jobs, seed by seed, with 95 % bootstraps over the seeds. Writes `attained.json`.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from environment import environment
from workers import add_workers

from demand import (
    FCFS,
    LAS,
    MLFQ,
    ClassMean,
    DecayingLAS,
    Oracle,
    Policy,
    RandomOrder,
    Workload,
    bimodal_mix,
    bootstrap_interval,
    hermes_mix,
    poisson_workload,
    recorded_applications,
    simulate,
)
from demand.sweep import spread
from demand.traces import read_agent_sessions


def workloads(data: Path) -> dict[str, Callable[[int, int], Workload]]:
    """By name: of a number of jobs and a seed."""
    found: dict[str, Callable[[int, int], Workload]] = {
        "bimodal": lambda jobs, seed: bimodal_mix(load=0.9, jobs=jobs, seed=seed),
        "Hermes mix": lambda jobs, seed: hermes_mix(load=0.9, jobs=jobs, seed=seed),
    }
    path = data / "agent_sessions" / "sessions.jsonl.gz"
    if path.exists():
        runs = [session.run(leave_out=("human",)) for session in read_agent_sessions(path)]
        runs = [run for run in runs if run]
        half = len(runs) // 2
        agents = recorded_applications(train={"a": runs[:half]}, test={"a": runs[half:]})
        found["coding agents"] = lambda jobs, seed: poisson_workload(agents, 0.9, jobs, seed)
    return found


def arms(mean: float) -> dict[str, Policy]:
    """Quanta and times are in hundredths and multiples of the mean demand."""
    quantum = mean / 100
    return {
        "FCFS": FCFS(),
        "random order": RandomOrder(),
        "LAS": LAS(quantum),
        "decaying LAS, half-life 10 means": DecayingLAS(10 * mean, quantum),
        "decaying LAS, 1 mean": DecayingLAS(mean, quantum),
        "MLFQ": MLFQ(quantum, 2.0, 12),
        "MLFQ, promotion after 20 means": MLFQ(quantum, 2.0, 12, 20 * mean),
        "MLFQ, 5 means": MLFQ(quantum, 2.0, 12, 5 * mean),
        "class mean": ClassMean(),
        "oracle": Oracle(),
    }


def figures(workload: Workload, policy: Policy, seed: int) -> dict[str, float]:
    """Mean and P99 of completion, largest slowdown, preemptions a job."""
    result = simulate(workload, policy, seed=seed)
    return {
        "mean": result.mean,
        "p99": result.quantile(0.99),
        "worst_slowdown": float(np.max(result.completion_times / workload.demands)),
        "preemptions": result.preemptions / len(workload),
    }


def served(
    drawn: dict[str, Callable[[int, int], Workload]], jobs: int, cell: tuple[str, int]
) -> dict[str, dict[str, float]]:
    """The figures of all arms on one workload of one seed."""
    name, seed = cell
    workload = drawn[name](jobs, seed)
    policies = arms(float(workload.demands.mean()))
    return {arm: figures(workload, policy, seed) for arm, policy in policies.items()}


def summed(seeds: list[dict[str, dict[str, float]]]) -> dict:
    """Ratios to FCFS by arm, with intervals over the seeds."""
    rows = {name: [of[name] for of in seeds] for name in seeds[0]}
    found: dict[str, dict] = {}
    for name, mine in rows.items():
        found[name] = {"preemptions": float(np.mean([row["preemptions"] for row in mine]))}
        for figure in ("mean", "p99", "worst_slowdown"):
            pairs = zip(mine, rows["FCFS"], strict=True)
            interval = bootstrap_interval([row[figure] / base[figure] for row, base in pairs])
            found[name][figure] = [interval.estimate, interval.low, interval.high]
    return found


def markdown(record: dict) -> str:
    """The table of docs/scheduling.md, from the JSON."""
    lines = [
        "| of FCFS | mean completion | P99 | largest slowdown | preemptions a job |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, found in record["results"].items():
        lines.append(f"| **{name}** | | | | |")
        for arm, row in found.items():
            cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*row[f]) for f in ("mean", "p99")]
            worst = f"{row['worst_slowdown'][0]:.2g}"
            lines.append(f"| {arm} | {' | '.join(cells)} | {worst} | {row['preemptions']:.2f} |")
    ran = record["configuration"]
    return "\n".join(lines) + f"\n\n{ran['seeds']} seeds of {ran['jobs']} jobs at load 0.9.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=6)
    add_workers(parser)
    args = parser.parse_args()
    drawn = workloads(args.data)
    cells = [(name, seed) for name in drawn for seed in range(args.seeds)]
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in drawn}
    each = spread(partial(served, drawn, args.jobs), cells, args.workers, what="seeds")
    for (name, _), figures_of_arms in zip(cells, each, strict=True):
        found[name].append(figures_of_arms)
    results = {name: summed(seeds) for name, seeds in found.items()}
    record = {
        "configuration": {"jobs": args.jobs, "seeds": args.seeds, "load": 0.9},
        "environment": environment(),
        "results": results,
    }
    print(markdown(record))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "attained.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
