"""The simulators beside those of another checkout: processor instructions for the same jobs.

    python examples/benchmarks/simulators_beside.py --before /path/to/another/checkout \
        --out docs/results

Seconds vary by a quarter on a machine that others use; instructions, as valgrind counts them, do
not. Each cell, a simulator at a load under a policy, runs once and twice in a process of its own:
the difference is what a simulation takes. Both checkouts are handed the same jobs, which this one
draws, and must give the same mean completion time. Writes `simulators_beside.json`.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

from tqdm import tqdm

import demand
from demand.simulation.engine import Engine, simulate_engine

ROOT = Path(__file__).parents[2]
JOBS = {"engine": 300, "queue": 3000}
LOADS = {"engine": (10.0, 50.0), "queue": (0.7, 0.95)}
POLICIES = {"FCFS": demand.FCFS(), "Gittins": demand.Gittins(), "LAS": demand.LAS(quantum=20.0)}


def draw(file: Path, simulator: str, load: float) -> None:
    """Write jobs: a seed draws other jobs of the mixes from version to version."""
    mix = demand.hermes_applications()
    workload = demand.poisson_workload(mix, load, JOBS[simulator], seed=0)
    assert workload.runs is not None
    drawn = {
        "arrivals": workload.arrivals.tolist(),
        "demands": workload.demands.tolist(),
        "applications": list(workload.applications),
        "load": load,
        "distributions": {
            application: [known.values.tolist(), known.weights.tolist()]
            for application, known in workload.distributions.items()
        },
    }
    if simulator == "engine":
        # Without what was not recorded: a checkout need not know fields that are never given.
        drawn["runs"] = [
            [{k: v for k, v in asdict(each).items() if v is not None} for each in run]
            for run in workload.runs
        ]
    file.write_text(json.dumps(drawn))


def read(file: Path) -> demand.Workload:
    """The jobs of a file."""
    drawn = json.loads(file.read_text())
    drawn["distributions"] = {
        application: demand.Distribution(*known)
        for application, known in drawn["distributions"].items()
    }
    if "runs" in drawn:
        drawn["runs"] = [
            [demand.Execution(**each | {"unit": demand.Unit(**each["unit"])}) for each in run]
            for run in drawn["runs"]
        ]
    return demand.Workload(**drawn)


def simulate(jobs: Path, policy: str, times: int) -> None:
    """Serve the jobs of a file so many times, and print the mean completion time."""
    workload = read(jobs)
    # Before there were two, all engines scheduled by rank.
    named = {each.name for each in fields(Engine)} & {"scheduling"}
    engine = Engine(blocks=65_536, preemption="pause", **dict.fromkeys(named, "by_rank"))
    gc.disable()  # when it runs depends on all that was allocated before
    for _ in range(times):
        if workload.runs is None:
            result = demand.simulate(workload, POLICIES[policy])
        else:
            result = simulate_engine(workload, POLICIES[policy], engine)
    print(json.dumps(result.mean))


def instructions(checkout: Path, jobs: Path, policy: str, times: int) -> tuple[int, float]:
    """Instructions of a process that serves the jobs, and the mean completion time."""
    command = [
        *("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"),
        *(sys.executable, __file__, "--jobs", str(jobs), "--policy", policy, "--times", str(times)),
    ]
    alike = {"PYTHONPATH": str(checkout.resolve()), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | alike, capture_output=True, text=True)
    found = re.search(r"I +refs: +([\d,]+)", done.stderr)
    if done.returncode or found is None:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(found[1].replace(",", "")), json.loads(done.stdout)


def commit(checkout: Path) -> str:
    """The commit that is checked out."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help="root of the checkout to hold this one against")
    parser.add_argument("--after", type=Path, default=ROOT, help="the same of the other side")
    parser.add_argument("--out", type=Path, help="directory for simulators_beside.json")
    parser.add_argument("--jobs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--policy", help=argparse.SUPPRESS)
    parser.add_argument("--times", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.jobs:
        simulate(args.jobs, args.policy, args.times)
        return
    if args.before is None:
        parser.error("--before is missing: the root of another checkout of this repository")
    cells = [(name, load, policy) for name in JOBS for load in LOADS[name] for policy in POLICIES]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for simulator, load, policy in tqdm(cells, desc="cells", disable=None):
            jobs = Path(folder) / f"{simulator}_{load}.json"
            if not jobs.exists():
                draw(jobs, simulator, load)
            row: dict = {"simulator": simulator, "load": load, "policy": policy}
            means = set()
            for side, checkout in (("before", args.before), ("after", args.after)):
                once, _ = instructions(checkout, jobs, policy, 1)
                twice, mean = instructions(checkout, jobs, policy, 2)
                row[f"{side}_instructions"] = twice - once
                means.add(mean)
            if len(means) > 1:
                raise RuntimeError(f"the two differ on {row}: mean completion times {means}")
            row["ratio"] = row["after_instructions"] / row["before_instructions"]
            rows.append(row)
            tqdm.write(
                f"{simulator:8} {load:5} {policy:8} {row['before_instructions'] / 1e6:8.0f} M "
                f"{row['after_instructions'] / 1e6:8.0f} M  {row['ratio']:.3f}"
            )
    if args.out:
        sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, no package
        from environment import environment

        record = {
            "configuration": {
                "before": commit(args.before),
                "after": commit(args.after),
                "jobs": JOBS,
                "loads": LOADS,
                "policies": {name: repr(policy) for name, policy in POLICIES.items()},
                "seed": 0,
            },
            "environment": environment(),
            "rows": rows,
        }
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "simulators_beside.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
