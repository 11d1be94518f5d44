"""The mix of Hermes drawn from its paper's table, and from the samples of its artifact.

    python examples/experiments/hermes_samples.py --data FOLDER --out docs/results

`hermes_mix` draws gamma variables around the means of the paper's table. The artifact of arXiv
2506.14851 (NephrenCake/Hermes) keeps samples: ten for each attribute of a stage in `pdgraphs.json`,
up to a hundred in `task_models_skewnorm.json`, which FOLDER has under `hermes_artifact`, gzipped.
All three are drawn at the same weights, served at the same load by one server that preempts at no
cost, and by an engine that batches. Do they agree, and what becomes of the paper's claim: a mean
completion time 70 % and a P95 80 % below first come, first served? Intervals are over seeds,
paired. Writes `hermes_samples.json`.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from environment import environment
from schedule_arms import ENGINE_JOBS, ENGINE_REQUESTS
from workers import add_workers

from demand import (
    FCFS,
    LAS,
    SERPT,
    Application,
    ClassMean,
    Engine,
    Gittins,
    Oracle,
    RandomOrder,
    RequestFCFS,
    compare,
    hermes_applications,
    paired_ratio_interval,
    poisson_workload,
)
from demand.traces import read_hermes_artifact
from demand.workloads import profiled_applications

TABLE = "paper's table"
FILES = {"pdgraphs.json": "pdgraphs.json.gz", "task_models": "task_models_skewnorm.json.gz"}
LOADS = (0.7, 0.9)
METRICS = ("mean_seconds", "p95_seconds")
CLAIMED = {"mean_seconds": 0.7, "p95_seconds": 0.8}
BASELINES = ("FCFS", "request FCFS")


def sources(folder: Path) -> dict[str, tuple[Application, ...]]:
    """The nine applications from each source, at the weights of the end-to-end mix."""
    table = hermes_applications()
    weights = {application.name: application.weight for application in table}
    found = {TABLE: table}
    for name, file in FILES.items():
        profiles = read_hermes_artifact(folder / "hermes_artifact" / file)
        found[name] = profiled_applications(profiles, weights=weights)
    return found


def demands(applications: Sequence[Application], jobs: int) -> dict[str, dict[str, float]]:
    """Of each application and of the whole mix: mean seconds, their spread, and its share."""
    drawn = {a.name: a.demands(np.random.default_rng(0), jobs) for a in applications}
    weights = np.array([a.weight for a in applications])
    weights /= weights.sum()
    means = np.array([drawn[a.name].mean() for a in applications])
    found = {
        a.name: {
            "mean_seconds": float(drawn[a.name].mean()),
            "cv": float(drawn[a.name].std() / drawn[a.name].mean()),
            "share_of_work": float(share),
        }
        for a, share in zip(applications, weights * means / (weights @ means), strict=True)
    }
    squares = np.array([(drawn[a.name] ** 2).mean() for a in applications])
    mean = float(weights @ means)
    cv = float(np.sqrt(weights @ squares - mean**2) / mean)
    return found | {"mix": {"mean_seconds": mean, "cv": cv, "share_of_work": 1.0}}


def served(
    applications: Sequence[Application],
    load: float,
    jobs: int,
    seeds: int,
    workers: int | str,
    engine: Engine | None = None,
) -> dict[str, dict]:
    """By policy: seconds, and how far they are below those of the baselines."""
    mean = np.average(
        [a.true_mean_seconds for a in applications], weights=[a.weight for a in applications]
    )
    policies = {
        "random": RandomOrder(),
        "request FCFS": RequestFCFS(),
        "FCFS": FCFS(),
        "LAS": LAS(quantum=float(mean) / 5),
        "class mean": ClassMean(),
        "SERPT": SERPT(),
        "Gittins": Gittins(),
        "oracle": Oracle(),
    }
    servers = 1 if engine is None else ENGINE_REQUESTS
    draw = partial(poisson_workload, applications, load, jobs, servers=servers)
    result = compare(draw, policies, range(seeds), engine=engine, workers=workers)
    rows = {}
    for name in policies:
        measured = {metric: result[name][metric]._asdict() for metric in METRICS}
        below = {
            baseline: {
                metric: _below(result.measured[name][metric], result.measured[baseline][metric])
                for metric in METRICS
            }
            for baseline in BASELINES
        }
        rows[name] = {**measured, "below": below}
    return rows


def _below(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    ratio = paired_ratio_interval(ours, theirs)
    return {
        "estimate": 1.0 - ratio.estimate, "low": 1.0 - ratio.high, "high": 1.0 - ratio.low
    }  # fmt: skip


def demand_table(record: dict) -> str:
    """As Markdown: seconds of each application from each source."""
    names = list(record["sources"])
    lines = [
        f"| application | {' | '.join(f'{name}: mean s | cv | of the work' for name in names)} |",
        "| --- |" + " ---: |" * (3 * len(names)),
    ]
    for application in record["sources"][TABLE]["demands"]:
        cells = []
        for name in names:
            row = record["sources"][name]["demands"][application]
            cells += [
                f"{row['mean_seconds']:.1f}", f"{row['cv']:.2f}", f"{row['share_of_work']:.0%}"
            ]  # fmt: skip
        lines.append(f"| {application} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claim_table(record: dict) -> str:
    """As Markdown: how far Gittins is below first come, first served; class mean in brackets."""
    heads = [
        f"{metric.removesuffix('_seconds')}, below {baseline}"
        for baseline in BASELINES
        for metric in METRICS
    ]
    lines = [
        f"| Gittins (class mean) | drawn from | {' | '.join(heads)} |",
        "| --- | --- |" + " ---: |" * len(heads),
    ]
    for where, source, rows in _places(record):
        cells = []
        for baseline in BASELINES:
            for metric in METRICS:
                below = {policy: row["below"][baseline][metric] for policy, row in rows.items()}
                cells.append(
                    "{estimate:.0%} [{low:.0%}, {high:.0%}]".format(**below["Gittins"])
                    + f" ({below['class mean']['estimate']:.0%})"
                )
        lines.append(f"| {where} | {source} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gains_table(record: dict) -> str:
    """As Markdown: mean completion time of every policy, over that of class mean."""
    _, _, first = next(_places(record))
    policies = [policy for policy in first if policy != "class mean"]
    lines = [
        f"| mean over class mean's | drawn from | class mean, s | {' | '.join(policies)} |",
        "| --- | --- |" + " ---: |" * (1 + len(policies)),
    ]
    for where, source, rows in _places(record):
        seconds = {policy: row["mean_seconds"]["estimate"] for policy, row in rows.items()}
        cells = [f"{seconds[policy] / seconds['class mean']:.2f}" for policy in policies]
        lines.append(f"| {where} | {source} | {seconds['class mean']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _places(record: dict) -> Iterator[tuple[str, str, dict[str, dict]]]:
    for where in record["sources"][TABLE]["served"]:
        for source, found in record["sources"].items():
            yield where, source, found["served"][where]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2000, help="jobs of a run on one server")
    parser.add_argument("--engine-jobs", type=int, default=ENGINE_JOBS)
    parser.add_argument("--seeds", type=int, default=15)
    add_workers(parser)
    args = parser.parse_args()
    begun = time.perf_counter()
    engine = Engine(max_requests=ENGINE_REQUESTS, preemption="none", scheduling="running_first")
    record: dict = {
        "configuration": {
            "jobs": args.jobs, "engine_jobs": args.engine_jobs, "seeds": list(range(args.seeds)),
            "loads": LOADS, "engine_load": LOADS[-1], "engine": vars(engine), "claimed": CLAIMED,
        },
        "environment": environment(),
        "sources": {},
    }  # fmt: skip
    for name, applications in sources(args.data).items():
        print(name, flush=True)
        places = {
            f"one server, load {load}": served(
                applications, load, args.jobs, args.seeds, args.workers
            )
            for load in LOADS
        }
        places[f"engine, load {LOADS[-1]}"] = served(
            applications, LOADS[-1], args.engine_jobs, args.seeds, args.workers, engine
        )
        record["sources"][name] = {
            "demands": demands(applications, args.jobs), "served": places
        }  # fmt: skip
        print(f"{time.perf_counter() - begun:.0f} s", flush=True)
    record["seconds"] = time.perf_counter() - begun
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "hermes_samples.json").write_text(json.dumps(record, indent=1) + "\n")
    print(demand_table(record))
    print(claim_table(record))
    print(gains_table(record))


if __name__ == "__main__":
    main()
