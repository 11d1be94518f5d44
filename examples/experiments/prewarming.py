"""What warming backends ahead saves, and what it holds for nothing.

    python examples/experiments/prewarming.py --out docs/results

Serves the applications of Hermes (arXiv 2506.14851) on a simulated engine with continuous batching.
Two scenarios: *tools*, where each job's container and one of eight models (`hugginggpt` picks one,
some more often than others) have cold starts; and *adapters*, where every application has a LoRA
adapter and four of them fit. All prewarmers serve the same jobs of a seed; intervals are over
seeds. Writes `prewarming.json` and `prewarming.png`.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from demand import (
    FCFS,
    Application,
    ClassMean,
    CostModel,
    Execution,
    Gittins,
    Oracle,
    PDGraph,
    Policy,
    RandomOrder,
    Unit,
    Workload,
    bootstrap_interval,
    hermes_applications,
    paired_ratio_interval,
    poisson_workload,
)
from demand.prewarm import (
    AlwaysAtStart,
    ArtifactPrewarm,
    CostAwarePlanner,
    NoPrewarm,
    OraclePrewarm,
    Prewarmer,
    PrewarmPlanner,
    WaitingQueue,
)
from demand.simulation.engine import Engine, EngineResult, Pool, simulate_engine
from demand.sweep import spread
from demand.workloads.hermes import hermes_generator

sys.path.insert(0, str(Path(__file__).parent))  # scripts, not a package
from environment import environment
from prewarming_figure import figure
from workers import add_workers

POLICIES: dict[str, Policy] = {
    "FCFS": FCFS(),
    "random": RandomOrder(),
    "class mean": ClassMean(),
    "Gittins": Gittins(),
    "oracle": Oracle(),
}
"""The first is what the others are compared with."""
THRESHOLDS = tuple(k / 10 for k in range(1, 10))
PRICES = (0.01, 0.1, 0.3, 0.5, 0.7, 1.0, 3.0)
POPULARITY = np.array([0.4, 0.25, 0.12, 0.08, 0.06, 0.04, 0.03, 0.02])
"""Of the eight models; a few likely ones, as for a model hub."""
CONTAINER_SECONDS, MODEL_SECONDS, ADAPTER_SECONDS = 5.0, 10.0, 1.5
CONTAINERS, MODELS, ADAPTERS = 32, 4, 4


@dataclass(frozen=True)
class Arm:
    """A prewarmer under a name, and whether idle instances stay warm until their slot is needed."""

    name: str
    prewarm: Prewarmer
    kept: bool = False
    family: str = "baseline"


def arms() -> list[Arm]:
    """Baselines, and each planner over its parameter."""
    return [
        Arm("none", NoPrewarm()),
        Arm("LRU", NoPrewarm(), kept=True),
        Arm("LRU, waiting queue (EPWQ)", WaitingQueue(), kept=True),
        Arm("always at start", AlwaysAtStart()),
        Arm("oracle", OraclePrewarm()),
        Arm("LRU, always at start", AlwaysAtStart(), kept=True),
        Arm("LRU, K = 0.5", PrewarmPlanner(0.5), kept=True),
        Arm("LRU, oracle", OraclePrewarm(), kept=True),
        *(Arm(f"K = {k}", PrewarmPlanner(k), family="paper") for k in THRESHOLDS),
        *(Arm(f"artifact, {k}", ArtifactPrewarm(k), family="artifact") for k in THRESHOLDS),
        *(Arm(f"price {p}", CostAwarePlanner(p), family="cost-aware") for p in PRICES),
    ]


def pools(scenario: str, kept: bool) -> dict[str, Pool]:
    """Backends of a scenario."""
    keep = np.inf if kept else 0.0
    if scenario == "adapters":
        return {"llm": Pool.adapters(ADAPTERS, ADAPTER_SECONDS, keep)}
    return {
        "container": Pool.containers(CONTAINERS, CONTAINER_SECONDS, keep),
        "model": Pool.models(MODELS, MODEL_SECONDS, keep),
    }


def pick_models(rng: np.random.Generator, n: int) -> list[list[Execution]]:
    """Runs of `hugginggpt` in which the plan picks one of eight models."""
    generator, runs = hermes_generator("hugginggpt"), []
    for run in generator.runs(rng, n):
        model = Unit(f"model_{rng.choice(POPULARITY.size, p=POPULARITY)}", "model")
        runs.append([replace(e, unit=model) if e.unit.kind == "model" else e for e in run])
    return runs


def applications(training_runs: int = 1000) -> list[Application]:
    """The nine applications, `hugginggpt` with its choice of models."""
    picked = PDGraph.fit(pick_models(np.random.default_rng(1), training_runs), name="hugginggpt")
    return [
        replace(a, graph=picked, distribution=picked.remaining(), sample_runs=pick_models)
        if a.name == "hugginggpt"
        else a
        for a in hermes_applications(training_runs)
    ]  # fmt: skip


def serve(args: argparse.Namespace, policy: Policy, arm: Arm, scenario: str, pace: CostModel,
          workloads: list[Workload]) -> list[EngineResult]:  # fmt: skip
    """A result for each seed."""
    return [
        simulate_engine(
            workload,
            policy,
            Engine(max_requests=args.width),
            backends=pools(scenario, arm.kept),
            prewarm=arm.prewarm,
            pace=pace,
            seed=seed,
        )
        for seed, workload in enumerate(workloads)
    ]


def figures(results: list[EngineResult], none: list[EngineResult]) -> dict:
    """Over seeds: mean completion, its reduction, and what was held for nothing, per job."""
    means = [result.mean for result in results]
    reports = [list(result.backends.values()) for result in results]
    jobs = len(results[0].completion_times)

    def per_job(entry: str) -> dict:
        sums = [sum(getattr(report, entry) for report in each) / jobs for each in reports]
        return bootstrap_interval(sums)._asdict()

    ratio = paired_ratio_interval(means, [result.mean for result in none])
    return {
        "mean_seconds": bootstrap_interval(means)._asdict(),
        "mean_batch": float(np.mean([result.mean_batch for result in results])),
        "p95_seconds": bootstrap_interval([result.quantile(0.95) for result in results])._asdict(),
        "reduction": {
            "estimate": 1 - ratio.estimate,
            "low": 1 - ratio.high,
            "high": 1 - ratio.low,
        },
        "wait_seconds": per_job("wait_seconds"),
        "idle_seconds": per_job("idle_seconds"),
        "unused": per_job("unused"),
        "unused_seconds": per_job("unused_seconds"),
        "cold": per_job("cold"),
        "uses": per_job("uses"),
    }


def measured_pace(results: list[EngineResult]) -> CostModel:
    """Seconds of a decoded token as the engine was seen to take them, with no prewarming."""
    seconds = sum(result.busy_seconds for result in results)
    return CostModel(Engine().prefill_seconds_per_token, seconds / sum(r.steps for r in results))


def served(
    args: argparse.Namespace,
    workloads: dict[float, list[Workload]],
    paces: dict[float, CostModel],
    cell: tuple[float, Policy, Arm, str],
) -> list[EngineResult]:
    """A result for each seed, at a load."""
    load, policy, arm, scenario = cell
    return serve(args, policy, arm, scenario, paces[load], workloads[load])


def run(args: argparse.Namespace) -> dict:
    """Everything that the JSON holds."""
    mix = applications()
    workloads = {
        load: [poisson_workload(mix, load, args.jobs, seed) for seed in range(args.seeds)]
        for load in (args.load, args.busy_load)
    }
    none = arms()[0]
    paces, rows, policies = {}, [], []
    for load, drawn in workloads.items():
        paces[load] = measured_pace(serve(args, Gittins(), none, "tools", CostModel(), drawn))
    known = Gittins()
    cells = [
        (args.load, known, arm, scenario) for scenario in ("tools", "adapters") for arm in arms()
    ]
    spreading = partial(spread, partial(served, args, workloads, paces), workers=args.workers)
    for cell, results in zip(cells, spreading(cells, what="prewarmers"), strict=True):
        _, _, arm, scenario = cell
        if arm.name == none.name:  # the first of a scenario
            baseline = results
        row = {"scenario": scenario, "prewarmer": arm.name, "family": arm.family}
        rows.append(row | {"kept": arm.kept} | figures(results, baseline))
    few = (none, Arm("K = 0.5", PrewarmPlanner(0.5)), Arm("oracle", OraclePrewarm()))
    named = [(load, name, arm) for load in workloads for name in POLICIES for arm in few]
    cells = [(load, POLICIES[name], arm, "tools") for load, name, arm in named]
    first: dict[float, list[EngineResult]] = {}
    for (load, name, arm), results in zip(
        named, spreading(cells, what="policies and prewarmers"), strict=True
    ):
        baseline = first.setdefault(load, results)
        row = {"load": load, "policy": name, "prewarmer": arm.name}
        policies.append(row | figures(results, baseline))
    return {
        "configuration": {
            **{name: value for name, value in vars(args).items() if name not in ("out", "workers")},
            "containers": CONTAINERS, "container_seconds": CONTAINER_SECONDS,
            "models": MODELS, "model_seconds": MODEL_SECONDS, "popularity": POPULARITY.tolist(),
            "adapters": ADAPTERS, "adapter_seconds": ADAPTER_SECONDS,
            "decode_seconds_per_token": {
                str(load): pace.decode_seconds_per_token for load, pace in paces.items()
            },
        },
        "environment": environment(),
        "rows": rows,
        "policies": policies,
    }  # fmt: skip


def table(rows: list[dict], label: str = "prewarmer") -> str:
    """Markdown."""
    lines = [
        f"| {label} | mean s | reduction | waits s | idle s | unused warm-ups |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cut = row["reduction"]
        lines.append(
            f"| {row[label]} | {row['mean_seconds']['estimate']:.1f} "
            f"| {cut['estimate']:.1%} ({cut['low']:.1%} to {cut['high']:.1%}) "
            f"| {row['wait_seconds']['estimate']:.2f} | {row['idle_seconds']['estimate']:.2f} "
            f"| {row['unused']['estimate']:.3f} |"
        )
    return "\n".join(lines)


def tables(record: dict) -> str:
    """What stands on the page: each scenario, then policies and loads."""
    parts = []
    for scenario in dict.fromkeys(row["scenario"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["scenario"] == scenario]
        parts += [f"{scenario.capitalize()}:", table(rows)]
    label = "load, policy, prewarmer"
    rows = [
        row | {label: f"{row['load']:.0f}, {row['policy']}, {row['prewarmer']}"}
        for row in record["policies"]
    ]
    parts += ["Tools, by policy and load, reduction against the first row of a load:"]
    return "\n\n".join([*parts, table(rows, label)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--load", type=float, default=18.0, help="seconds of demand a second")
    parser.add_argument("--busy-load", type=float, default=45.0)
    parser.add_argument("--width", type=int, default=64)
    add_workers(parser)
    args = parser.parse_args()
    record = run(args)
    print(tables(record))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "prewarming.json").write_text(json.dumps(record, indent=1) + "\n")
    figure(record, args.out / "prewarming.png")


if __name__ == "__main__":
    main()
