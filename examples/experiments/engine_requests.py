"""What users of an engine measure: first tokens, times between tokens, goodput, KV held.

    python examples/experiments/engine_requests.py --out docs/results

Serves the applications of Hermes (arXiv 2506.14851) on an engine of the profile in its artifact,
under every policy of engine.py, with ample KV. All serve the same jobs of a seed, due a multiple of
their demand after they arrive; intervals are over seeds.
Writes `engine_requests.json`, and with matplotlib `engine_requests.png`.
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from demand import (
    EngineResult,
    Workload,
    bootstrap_interval,
    hermes_applications,
    poisson_workload,
    with_deadlines,
)
from demand.simulation.engine import Engine
from demand.sweep import spread

sys.path.insert(0, str(Path(__file__).parent))  # scripts, not a package
import demand_tables
from engine import AMPLE, POLICIES, serve
from environment import environment
from workers import add_workers

TTFT, TBT = 5.0, 0.5
FACTOR = 2.0
DRAWN = ("request FCFS", "Gittins")
MEASURED = ("p50_ttft_seconds", "p95_ttft_seconds", "p99_ttft_seconds",
            "p50_tbt_seconds", "p95_tbt_seconds", "p99_tbt_seconds")  # fmt: skip


def figures(results: list[EngineResult]) -> dict[str, Any]:
    """Quantiles, goodput and KV-seconds, with intervals over seeds."""
    summaries = [result.summary() for result in results]
    goodputs = [result.goodput(ttft=TTFT, tbt=TBT) for result in results]
    measured = {name: [summary[name] for summary in summaries] for name in MEASURED}
    measured["kv_block_seconds_per_job"] = [
        result.kv_block_seconds / len(result.completion_times) for result in results
    ]
    measured["requests_per_second"] = [good.requests_per_second for good in goodputs]
    measured["request_share"] = [good.request_share for good in goodputs]
    measured["deadline_jobs_per_second"] = [result.goodput().jobs_per_second for result in results]
    return {name: bootstrap_interval(values)._asdict() for name, values in measured.items()}


def picture(drawn: dict[str, EngineResult], path: Path) -> None:
    """First tokens and gaps, application by application, a row a policy."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11.0, 4.2 * len(drawn)), layout="constrained")
    for name, row in zip(drawn, canvas.subplots(len(drawn), 2, squeeze=False), strict=True):
        for of, ax in zip(("ttft", "tbt"), row, strict=True):
            drawn[name].requests.figure(of, ax).set_title(name)
    canvas.savefig(path, dpi=80)


def served(workloads: list[Workload], engine: Engine, name: str) -> list[EngineResult]:
    """A result for each seed."""
    return serve(workloads, POLICIES[name], engine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--load", type=float, default=50.0, help="seconds of demand a second")
    add_workers(parser)
    args = parser.parse_args()
    mix, engine = hermes_applications(), Engine(blocks=AMPLE)
    workloads = [
        with_deadlines(poisson_workload(mix, args.load, args.jobs, seed), FACTOR)
        for seed in range(args.seeds)
    ]
    rows, applications, drawn = [], [], {}
    serve_all = partial(served, workloads, engine)
    found = spread(serve_all, list(POLICIES), args.workers, what="policies")
    for name, results in zip(POLICIES, found, strict=True):
        rows.append({"policy": name} | figures(results))
        if name in DRAWN:
            drawn[name] = results[0]
            applications += [{"policy": name} | row for row in results[0].requests.table]
    record = {
        "configuration": {
            **{name: value for name, value in vars(args).items() if name not in ("out", "workers")},
            "engine": asdict(engine),
            "ttft_seconds": TTFT,
            "tbt_seconds": TBT,
            "deadline_factor": FACTOR,
        },
        "environment": environment(),
        "policies": rows,
        "applications": applications,
    }
    print(demand_tables.engine_requests(record))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "engine_requests.json").write_text(json.dumps(record, indent=1) + "\n")
    picture(drawn, args.out / "engine_requests.png")


if __name__ == "__main__":
    main()
