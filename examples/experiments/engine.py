"""Policies on a simulated engine with continuous batching, and how fast the simulator is.

    python examples/experiments/engine.py --out docs/results

Serves the applications of Hermes (arXiv 2506.14851), runs and all, on an engine of the profile in
its artifact: every policy with ample KV, then every way to schedule and preempt with scarce KV. All
serve the same jobs of a seed; intervals are over seeds. Last, the speed of the simulator, at rising
load and with ever more jobs. Writes `engine.json` and `engine_speed.json`; `--only` one of them.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from demand import (
    FCFS,
    SERPT,
    ClassMean,
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
from demand.policies import LAS, RequestFCFS
from demand.simulation.engine import (
    Engine,
    EngineResult,
    Preemption,
    Scheduling,
    simulate_engine,
)
from demand.sweep import spread

sys.path.insert(0, str(Path(__file__).parent))  # scripts, not a package
import demand_tables
from environment import environment
from workers import add_workers

POLICIES: dict[str, Policy] = {
    "random": RandomOrder(),
    "request FCFS": RequestFCFS(),
    "FCFS": FCFS(),
    "LAS": LAS(quantum=20.0),
    "class mean": ClassMean(),
    "SERPT": SERPT(),
    "Gittins": Gittins(),
    "oracle": Oracle(),
}
MODES: tuple[tuple[Scheduling, Preemption], ...] = (
    ("running_first", "none"),
    ("running_first", "recompute"),
    ("by_rank", "none"),
    ("by_rank", "pause"),
    ("by_rank", "recompute"),
    ("by_rank", "swap"),
)
AMPLE, SCARCE = 65_536, 4_000
SPEED_LOADS = (10.0, 20.0, 30.0, 40.0, 50.0)
OVERLOAD = ((50.0, 1_000), (60.0, 1_000))
TIMED = ("FCFS", "Gittins")
GROWTH_LOAD = 20.0
GROWTH_JOBS = (1_000, 10_000, 100_000, 1_000_000)


def serve(workloads: list[Workload], policy: Policy, engine: Engine) -> list[EngineResult]:
    """A result for each seed."""
    return [
        simulate_engine(workload, policy, engine, seed=seed)
        for seed, workload in enumerate(workloads)
    ]


def figures(results: list[EngineResult], baseline: list[EngineResult]) -> dict:
    """Completion over seeds, relative to `baseline`, and what the engine did for each job."""
    means = [result.mean for result in results]
    jobs = len(results[0].completion_times)

    def per_job(entry: str) -> float:
        return float(np.mean([getattr(result, entry) for result in results])) / jobs

    return {
        "mean_seconds": bootstrap_interval(means)._asdict(),
        "p95_seconds": bootstrap_interval([r.quantile(0.95) for r in results])._asdict(),
        "mean_over_fcfs": paired_ratio_interval(means, [r.mean for r in baseline])._asdict(),
        "mean_batch": float(np.mean([result.mean_batch for result in results])),
        "preemptions_per_job": per_job("preemptions"),
        "prefilled_again_per_job": per_job("prefilled_again"),
        "swapped_blocks_per_job": per_job("swapped_blocks"),
        "peak_blocks": max(result.peak_blocks for result in results),
    }


def compare(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Rows of the policies, and of the ways to preempt."""
    mix = hermes_applications()
    workloads = [poisson_workload(mix, args.load, args.jobs, seed) for seed in range(args.seeds)]
    ample = Engine(max_requests=args.width, blocks=AMPLE)
    baseline = serve(workloads, RequestFCFS(), ample)
    arms = [({"policy": name}, name, ample) for name in POLICIES] + [
        (
            {"scheduling": scheduling, "preemption": mode, "policy": name},
            name,
            replace(ample, blocks=SCARCE, preemption=mode, scheduling=scheduling),
        )
        for scheduling, mode in MODES
        for name in ("request FCFS", "FCFS", "Gittins")
    ]
    served = spread(partial(_served, workloads), arms, args.workers, what="policies and modes")
    rows = [of | figures(each, baseline) for (of, _, _), each in zip(arms, served, strict=True)]
    return rows[: len(POLICIES)], rows[len(POLICIES) :]


def _served(workloads: list[Workload], arm: tuple[dict, str, Engine]) -> list[EngineResult]:
    """What `serve` gives of an arm."""
    return serve(workloads, POLICIES[arm[1]], arm[2])


def timed(workload: Workload, name: str) -> tuple[EngineResult, float]:
    """A result, and the seconds of processor time that it took."""
    start = time.process_time()
    result = simulate_engine(workload, POLICIES[name], Engine(blocks=AMPLE))
    return result, time.process_time() - start


def rates(result: EngineResult, name: str, seconds: list[float]) -> dict:
    """What the simulator does in a second of processor time, the median of several runs."""
    took = float(np.median(seconds))
    return {
        "policy": name,
        "mean_batch": result.mean_batch,
        "looks_per_second": result.decisions / took,
        "steps_per_second": result.steps / took,
        "tokens_per_second": result.steps * result.mean_batch / took,
        "events_per_second": result.events / took,
        "fastest_events_per_second": result.events / min(seconds),
        "seconds_per_1000_jobs": took / len(result.completion_times) * 1000,
    }


def speed(args: argparse.Namespace) -> list[dict]:
    """The speed of the simulator at rising load, last where the queue grows long.

    Cells take turns, so that a slow stretch of the machine falls on all of them.
    """
    cells = [*((load, args.speed_jobs) for load in SPEED_LOADS), *OVERLOAD]
    workloads = [poisson_workload(hermes_applications(), *cell, seed=0) for cell in cells]
    seconds: dict[tuple[int, str], list[float]] = {}
    results = {}
    for _ in tqdm(range(args.repeats), desc="speed"):
        for i, workload in enumerate(workloads):
            for name in TIMED:
                results[i, name], took = timed(workload, name)
                seconds.setdefault((i, name), []).append(took)
    return [
        {"load": cells[i][0], "jobs": cells[i][1]} | rates(result, name, seconds[i, name])
        for (i, name), result in results.items()
    ]


def growth(args: argparse.Namespace) -> list[dict]:
    """The speed of the simulator with ever more jobs at one load."""
    rows = []
    for jobs in tqdm([n for n in GROWTH_JOBS if n <= args.growth_jobs], desc="growth"):
        workload = poisson_workload(hermes_applications(), GROWTH_LOAD, jobs, seed=0)
        for name in TIMED:
            result, took = timed(workload, name)
            rows.append({"jobs": jobs} | rates(result, name, [took]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--load", type=float, default=50.0, help="seconds of demand a second")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--speed-jobs", type=int, default=300)
    parser.add_argument("--growth-jobs", type=int, default=GROWTH_JOBS[-1], help="at most")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=("engine", "engine_speed"), help="which record to write")
    add_workers(parser)
    args = parser.parse_args()
    apart = ("out", "only", "workers")
    given = {name: value for name, value in vars(args).items() if name not in apart}
    about = {
        "configuration": {
            **given,
            "engine": asdict(Engine(max_requests=args.width, blocks=AMPLE)),
            "scarce_blocks": SCARCE,
            "growth_load": GROWTH_LOAD,
        },
        "environment": environment(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only != "engine_speed":
        policies, modes = compare(args)
        record = about | {"policies": policies, "modes": modes}
        write(args.out / "engine.json", record, demand_tables.engine(record))
    if args.only != "engine":
        record = about | {"speed": speed(args), "growth": growth(args)}
        write(args.out / "engine_speed.json", record, demand_tables.engine_speed(record))


def write(path: Path, record: dict, tables: str) -> None:
    """Write a record, and show its tables."""
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{tables}")


if __name__ == "__main__":
    main()
