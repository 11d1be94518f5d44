"""Four engines behind a router: where the calls of agents go, and what it is worth.

    python examples/experiments/routing.py --data FOLDER --out docs/results

`FOLDER` holds agent_sessions/sessions.jsonl.gz (see docs/traces.md). Serves the recorded coding
sessions as prefix_reuse.py does, on engines that keep KV by `LRU`, and the applications of Hermes
(arXiv 2506.14851), whose runs share no prompts, each under every router and two policies. All serve
the same jobs of a seed; intervals are over seeds. Writes `routing.json` and `routing.png`.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from demand import (
    FCFS,
    ClusterResult,
    Engine,
    ExpectedDemand,
    Gittins,
    LeastLoaded,
    PrefixAffinity,
    RandomEngine,
    Router,
    WeightedScores,
    Workload,
    bootstrap_interval,
    hermes_applications,
    paired_ratio_interval,
    poisson_workload,
    simulate_cluster,
)
from demand.simulation.engine import LRU
from demand.sweep import spread

sys.path.insert(0, str(Path(__file__).parent))  # scripts, not a package
import engine_tables
import prefix_reuse
from environment import environment
from workers import add_workers

ROUTERS: dict[str, Callable[[int], Router]] = {
    "random": RandomEngine,
    "least loaded": lambda seed: LeastLoaded(),
    "weighted scores": lambda seed: WeightedScores(),
    "prefix affinity": lambda seed: PrefixAffinity(math.inf),
    "prefix affinity, bound 2": lambda seed: PrefixAffinity(2.0),
    "expected demand": lambda seed: ExpectedDemand(),
    "expected demand, anew": lambda seed: ExpectedDemand(0.0),
}
"""By name: made for each seed, which a random one draws by."""
POLICIES = {"FCFS": FCFS(), "Gittins": Gittins()}
BASELINE = "random"


@dataclass(frozen=True)
class Mix:
    """What is served: a workload for each seed, and each of the engines."""

    name: str
    workloads: list[Workload]
    engine: Engine


def mixes(args: argparse.Namespace) -> list[Mix]:
    """The coding sessions at each distance of arrivals, and the applications of Hermes."""
    coding = prefix_reuse.engine(args, LRU())
    found = [
        Mix(f"coding, {gap:g} s apart", prefix_reuse.workloads(args, gap), coding)
        for gap in args.gaps
    ]
    hermes = [
        poisson_workload(hermes_applications(), args.load, args.jobs, seed)
        for seed in range(args.hermes_seeds)
    ]
    name = f"Hermes, load {args.load:g}"
    return [*found, Mix(name, hermes, Engine(blocks=args.hermes_blocks))]


def in_engines(result: ClusterResult) -> np.ndarray:
    """`[jobs]` seconds from arrival to finish without those of units outside of the engines."""
    assert result.workload.runs is not None
    return result.completion_times - [prefix_reuse.outside(run) for run in result.workload.runs]


def figures(results: list[ClusterResult], baseline: list[ClusterResult]) -> dict:
    """Over seeds."""

    def over(values: list[float]) -> dict:
        return bootstrap_interval(values)._asdict()

    means, before = ([float(in_engines(r).mean()) for r in each] for each in (results, baseline))
    return {
        "mean_seconds": over([r.mean for r in results]),
        "p95_seconds": over([r.quantile(0.95) for r in results]),
        "mean_in_engines_seconds": over(means),
        "mean_in_engines_over_random": paired_ratio_interval(means, before)._asdict(),
        "p95_in_engines_seconds": over([float(np.quantile(in_engines(r), 0.95)) for r in results]),
        "p95_ttft_seconds": over([r.ttft_quantile(0.95) for r in results]),
        "hit_rate": over([r.prefixes.hit_rate for r in results]),
        "of_findable": over([r.prefixes.found / max(r.prefixes.findable, 1) for r in results]),
        "moved_share": over([r.moves / r.table[0]["units"] for r in results]),
        "imbalance": over([r.imbalance for r in results]),
        "busy_share": over([r.table[0]["busy_share"] for r in results]),
        "engines": [
            {name: engine[name] for name in ("engine", "busy_share", "hit_rate", "units")}
            for engine in results[0].table[1:]
        ],
    }


def picture(rows: list[dict], path: Path) -> None:
    """Seconds in the engines over those of the random router, a panel a mix."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["mix"] for row in rows))
    canvas = Figure(figsize=(4.2 * len(names), 4.0), layout="constrained")
    at = {router: -i for i, router in enumerate(ROUTERS)}
    panels = canvas.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for ax, mix in zip(panels, names, strict=True):
        for policy, marker, shift in (("FCFS", "o", 0.15), ("Gittins", "s", -0.15)):
            chosen = [row for row in rows if (row["mix"], row["policy"]) == (mix, policy)]
            ratio = [row["mean_in_engines_over_random"] for row in chosen]
            middle = np.array([each["estimate"] for each in ratio])
            low, high = ([each[side] for each in ratio] for side in ("low", "high"))
            ax.errorbar(
                middle,
                [at[row["router"]] + shift for row in chosen],
                xerr=np.abs([middle - low, np.array(high) - middle]),
                fmt=marker,
                label=policy,
            )
        ax.axvline(1.0, color="0.8", zorder=0)
        ax.set(title=mix, xlabel="mean s in the engines, over random", xscale="log")
        ax.set_yticks(list(at.values()), list(at))
        ax.set_xticks([0.25, 0.5, 1.0, 2.0], ["0.25", "0.5", "1", "2"])
        ax.minorticks_off()
    ax.legend(fontsize="small")
    canvas.savefig(path, dpi=100)


def routed(
    at_work: dict[str, Mix], engines: int, cell: tuple[str, str, str]
) -> tuple[list[ClusterResult], float]:
    """A result for each seed, and the seconds of processor time that they took."""
    begun = time.process_time()
    name, policy, router = cell
    mix = at_work[name]
    results = [
        simulate_cluster(
            workload, POLICIES[policy], mix.engine, engines, ROUTERS[router](seed), seed=seed
        )
        for seed, workload in enumerate(mix.workloads)
    ]
    return results, time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--sessions", type=int, default=None, help="at most; all if left out")
    parser.add_argument("--seeds", type=int, default=3, help="of the coding sessions")
    parser.add_argument("--gaps", type=float, nargs="+", default=[225.0, 120.0],
                        help="seconds between arrivals of coding sessions")  # fmt: skip
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--blocks", type=int, default=16_384)
    parser.add_argument("--block-tokens", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=800, help="of the Hermes mix")
    parser.add_argument("--load", type=float, default=180.0, help="seconds of demand a second")
    parser.add_argument("--hermes-seeds", type=int, default=5)
    parser.add_argument("--hermes-blocks", type=int, default=65_536)
    add_workers(parser)
    args = parser.parse_args()
    begun = time.process_time()
    served, spent = mixes(args), 0.0
    at_work = {mix.name: mix for mix in served}
    cells = [(mix, policy, router) for mix in at_work for policy in POLICIES for router in ROUTERS]
    task = partial(routed, at_work, args.engines)
    found = spread(task, cells, args.workers, what="mixes, policies and routers")
    rows, baseline = [], []
    for (mix, policy, router), (results, seconds) in zip(cells, found, strict=True):
        if router == BASELINE:  # the first of a policy
            baseline = results
        of = {"mix": mix, "policy": policy, "router": router}
        rows.append(of | figures(results, baseline))
        spent += 0.0 if args.workers == 1 else seconds
    record = {
        "configuration": {
            **{
                name: value
                for name, value in vars(args).items()
                if name not in ("out", "data", "workers")
            },
            "routers": {name: repr(router(0)) for name, router in ROUTERS.items()},
            "mixes": {mix.name: asdict(mix.engine) for mix in served},
            "assumed_seconds": prefix_reuse.ASSUMED,
        },
        "environment": environment(),
        "rows": rows,
        "processor_seconds": time.process_time() - begun + spent,
    }
    print(engine_tables.routing(record))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "routing.json").write_text(json.dumps(record, indent=1) + "\n")
    picture(rows, args.out / "routing.png")


if __name__ == "__main__":
    main()
