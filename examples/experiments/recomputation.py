"""What a policy pays on an engine that recomputes the KV of whom it displaces, and what helps.

    python examples/experiments/recomputation.py --out docs/results

Serves the applications of Hermes (arXiv 2506.14851), as they are and without labels (one
application of which all samples are known), on an engine that displaces by recomputation, as vLLM
does with the scheduler of `demand`, and on one that displaces nobody, as vLLM alone. Each policy
as it is, with a quantum, and with hysteresis. All serve the same jobs of a seed; intervals are
over seeds. Writes `recomputation.json`.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

from demand import (
    FCFS,
    SERPT,
    ClassMean,
    Distribution,
    Gittins,
    Oracle,
    Policy,
    RandomOrder,
    Workload,
    bootstrap_interval,
    hermes_applications,
    paired_ratio_interval,
    poisson_workload,
)
from demand.policies import LAS, Hysteresis, RequestFCFS, TimeSlice
from demand.simulation.engine import Engine, EngineResult, Preemption, Scheduling, simulate_engine
from demand.sweep import spread

sys.path.insert(0, str(Path(__file__).parent))  # scripts, not a package
import engine_tables
from environment import environment
from workers import add_workers

BLOCKS = 65_536
SECONDS = 100.0
"""Of the quantum and of the margin."""

ENGINES: dict[str, tuple[Scheduling, Preemption]] = {
    "displaces nobody": ("running_first", "none"),
    "displaces": ("running_first", "recompute"),
    "by rank": ("by_rank", "recompute"),
}


def policies() -> dict[str, Policy]:
    """By name; those that move with service with each of the remedies."""
    moving: dict[str, Policy] = {"LAS": LAS(quantum=20.0), "SERPT": SERPT(), "Gittins": Gittins()}
    return {
        "random": RandomOrder(),
        "request FCFS": RequestFCFS(),
        "FCFS": FCFS(),
        "class mean": ClassMean(),
        **moving,
        **{f"{name}, quantum": TimeSlice(policy, SECONDS) for name, policy in moving.items()},
        **{f"{name}, hysteresis": Hysteresis(policy, SECONDS) for name, policy in moving.items()},
        "oracle": Oracle(),
    }


def without_labels(workload: Workload) -> Workload:
    """The same jobs, of which only the demands of all applications together are known."""
    known = workload.distributions.values()
    values = np.concatenate([each.values for each in known])
    weights = np.concatenate([each.weights for each in known])
    return replace(
        workload,
        applications=["any"] * len(workload),
        distributions={"any": Distribution(values, weights)},
        graphs={},
    )


def figures(results: list[EngineResult], baseline: list[EngineResult]) -> dict:
    means = [result.mean for result in results]
    jobs = len(results[0].completion_times)
    again = [result.prefilled_again / jobs for result in results]
    preemptions = [result.preemptions / jobs for result in results]
    return {
        "mean_seconds": bootstrap_interval(means)._asdict(),
        "p95_seconds": bootstrap_interval([r.quantile(0.95) for r in results])._asdict(),
        "mean_over_fcfs": paired_ratio_interval(means, [r.mean for r in baseline])._asdict(),
        "prefilled_again_per_job": bootstrap_interval(again)._asdict(),
        "preemptions_per_job": bootstrap_interval(preemptions)._asdict(),
    }


def served(
    mixes: dict[str, list[Workload]], arm: tuple[str, str, str]
) -> tuple[list[EngineResult], list[EngineResult]]:
    """Of each seed: what all arms of an engine are held against, of its first one, and the arm."""
    which, engine, name = arm
    scheduling, preemption = ENGINES[engine]
    run = partial(
        simulate_engine,
        engine=Engine(blocks=BLOCKS, preemption=preemption, scheduling=scheduling),
    )
    baseline = [run(w, RequestFCFS()) for w in mixes[which]] if name == "random" else []
    return baseline, [run(w, policies()[name], seed=i) for i, w in enumerate(mixes[which])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--load", type=float, default=50.0, help="seconds of demand a second")
    add_workers(parser)
    args = parser.parse_args()
    mix = hermes_applications()
    labelled = [poisson_workload(mix, args.load, args.jobs, seed) for seed in range(args.seeds)]
    mixes = {"labelled": labelled, "unlabelled": [without_labels(each) for each in labelled]}
    rows = []
    arms = [(mix, engine, name) for mix in mixes for engine in ENGINES for name in policies()]
    baseline: list[EngineResult] = []
    found = spread(partial(served, mixes), arms, args.workers, what="arms")
    for (which, engine, name), (first, results) in zip(arms, found, strict=True):
        baseline = first or baseline
        rows.append({"mix": which, "engine": engine, "policy": name} | figures(results, baseline))
    record = {
        "configuration": {
            **{name: value for name, value in vars(args).items() if name not in ("out", "workers")},
            "engine": asdict(Engine(blocks=BLOCKS)),
            "engines": ENGINES,
            "quantum_seconds": SECONDS,
            "hysteresis_seconds": SECONDS,
        },
        "environment": environment(),
        "rows": rows,
    }
    print(engine_tables.recomputation(record))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "recomputation.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
