"""Speed of several simulated engines behind a router, beside that of one.

    python examples/benchmarks/cluster.py --out docs/results

Events a second of processor time: the Hermes mix on one engine (`simulate_engine`), and as much of
it for each of several engines behind each router. The cells take turns; figures are medians over
turns, and the ratio to one engine is that of the same turn. Writes `routing_speed.json`.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from demand import (
    FCFS,
    Engine,
    ExpectedDemand,
    Gittins,
    LeastLoaded,
    PrefixAffinity,
    RandomEngine,
    Router,
    WeightedScores,
    Workload,
    hermes_applications,
    poisson_workload,
    simulate_cluster,
    simulate_engine,
)

POLICIES = {"FCFS": FCFS(), "Gittins": Gittins()}
ROUTERS: dict[str, Router] = {
    "random": RandomEngine(),
    "least loaded": LeastLoaded(),
    "least KV": LeastLoaded("kv_share"),
    "weighted scores": WeightedScores(),
    "prefix affinity": PrefixAffinity(),
    "expected demand": ExpectedDemand(),
}
ONE = "one engine, no router"


def cells(engines: list[int], most: int) -> list[tuple[int, str]]:
    """Engines and router: each number of engines with one router, one number with each."""
    rows = [(1, ONE), (1, "least loaded")]
    for count in engines:
        rows += [(count, name) for name in ROUTERS if count == most or name == "least loaded"]
    return rows


def served(workload: Workload, policy: str, engine: Engine, count: int, router: str) -> dict:
    """What one run did, and the seconds it took."""
    start = time.process_time()
    if router == ONE:
        one = simulate_engine(workload, POLICIES[policy], engine)
        took = time.process_time() - start
        return {"seconds": took, "events": one.events, "decisions": one.decisions}
    result = simulate_cluster(workload, POLICIES[policy], engine, count, ROUTERS[router])
    took = time.process_time() - start
    decisions = sum(share.decisions for share in result.engines)
    return {"seconds": took, "events": result.events, "decisions": decisions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="directory for routing_speed.json")
    parser.add_argument("--load", type=float, default=50.0, help="of each engine")
    parser.add_argument("--jobs", type=int, default=300, help="for each engine")
    parser.add_argument("--engines", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--all-routers", type=int, default=4, help="engines with every router")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    engine, mix = Engine(blocks=65_536), hermes_applications()
    workloads = {
        count: poisson_workload(mix, args.load * count, args.jobs * count, args.seed)
        for count in (1, *args.engines)
    }
    todo = [
        (policy, *cell) for policy in POLICIES for cell in cells(args.engines, args.all_routers)
    ]
    found: dict[tuple[str, int, str], list[dict]] = {cell: [] for cell in todo}
    for _ in tqdm(range(args.repeats), desc="turns", disable=None):
        for policy, count, router in todo:
            turn = served(workloads[count], policy, engine, count, router)
            found[policy, count, router].append(turn)
    rows = []
    for (policy, count, router), turns in found.items():
        speeds = [turn["events"] / turn["seconds"] for turn in turns]
        ones = [turn["events"] / turn["seconds"] for turn in found[policy, 1, ONE]]
        rows.append(
            {
                "policy": policy,
                "engines": count,
                "router": router,
                "jobs": args.jobs * count,
                "events": turns[0]["events"],
                "decisions": turns[0]["decisions"],
                "events_per_second": statistics.median(speeds),
                "fastest_events_per_second": max(speeds),
                "decisions_per_second": statistics.median(
                    turn["decisions"] / turn["seconds"] for turn in turns
                ),
                "over_one_engine": statistics.median(
                    speed / one for speed, one in zip(speeds, ones, strict=True)
                ),
            }
        )
    for row in rows:
        print(
            f"{row['policy']:8} {row['engines']:3} {row['router']:22} {row['jobs']:6} jobs "
            f"{row['events_per_second']:9,.0f} events/s {row['over_one_engine']:5.2f}"
        )
    if args.out:
        sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, no package
        from environment import environment

        configuration = {name: value for name, value in vars(args).items() if name != "out"}
        record = {
            "configuration": configuration | {"engine": asdict(engine)},
            "environment": environment(),
            "rows": rows,
        }
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "routing_speed.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
