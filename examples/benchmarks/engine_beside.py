"""The engine simulator beside that of another checkout, in one run.

    python examples/benchmarks/engine_beside.py --before /path/to/another/checkout

Both serve the same jobs, which this one draws, in turns, each in a process of its own; a cell is a
load and a policy. The ratio is that of the medians of processor time. Both must have the same
completion times. Prints a table and writes nothing.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path

from beside import asked, started

import demand
from demand.simulation.engine import Engine, simulate_engine

ROOT = Path(__file__).parents[2]
LOADS = {"10": (10.0, 300), "30": (30.0, 300), "50": (50.0, 300), "60": (60.0, 1000)}
POLICIES = ("FCFS", "Gittins", "LAS")


def draw(folder: Path) -> None:
    """Write each load's jobs: a seed draws other jobs of the mixes from version to version."""
    mix = demand.hermes_applications()
    for name, (load, jobs) in LOADS.items():
        workload = demand.poisson_workload(mix, load, jobs, seed=0)
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
            # Without what was not recorded: a checkout need not know fields that are never given.
            "runs": [
                [{k: v for k, v in asdict(each).items() if v is not None} for each in run]
                for run in workload.runs
            ],
        }
        (folder / f"{name}.json").write_text(json.dumps(drawn))


def read(path: Path) -> demand.Workload:
    """The jobs of a file."""
    drawn = json.loads(path.read_text())
    drawn["distributions"] = {
        application: demand.Distribution(*known)
        for application, known in drawn["distributions"].items()
    }
    drawn["runs"] = [
        [demand.Execution(**each | {"unit": demand.Unit(**each["unit"])}) for each in run]
        for run in drawn["runs"]
    ]
    return demand.Workload(**drawn)


def serve(folder: Path) -> None:
    """Answer each cell with the seconds it took and the mean completion time."""
    # Before there were two, all engines scheduled by rank.
    named = {each.name for each in fields(Engine)} & {"scheduling"}
    engine = Engine(blocks=65_536, preemption="pause", **dict.fromkeys(named, "by_rank"))

    workloads = {name: read(folder / f"{name}.json") for name in LOADS}
    policies = {"FCFS": demand.FCFS(), "Gittins": demand.Gittins(), "LAS": demand.LAS(quantum=20.0)}
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        load, policy = line.split()
        start = time.process_time()
        result = simulate_engine(workloads[load], policies[policy], engine)
        took = time.process_time() - start
        print(json.dumps([took, result.mean]), flush=True)


def side_by_side(before: Path, after: Path, jobs: Path, repeats: int) -> None:
    """Let two checkouts serve the jobs of a folder in turns; print seconds and their ratio."""
    sides = {"before": before, "after": after}
    given = ["--jobs", str(jobs)]
    processes = {name: started(__file__, package, given) for name, package in sides.items()}
    for process in processes.values():
        asked(process)
    cells = [f"{load} {policy}" for load in LOADS for policy in POLICIES]
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(repeats):
        for cell in cells:
            order = list(processes) if turn % 2 else list(processes)[::-1]
            means = []
            for name in order:
                took, mean = asked(processes[name], cell)
                seconds.setdefault((name, cell), []).append(took)
                means.append(mean)
            assert means[0] == means[1], f"the two differ on {cell}: {means}"
    for process in processes.values():
        process.communicate()
    for cell in cells:
        first, second = (statistics.median(seconds[name, cell]) for name in ("before", "after"))
        print(f"{cell:12} {first:8.4f} s  {second:8.4f} s  {second / first:6.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help="root of the checkout to hold this one against")
    parser.add_argument("--after", type=Path, default=ROOT, help="the same of the other side")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--jobs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.jobs)
        return
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder))
        side_by_side(arguments.before, arguments.after, Path(folder), arguments.repeats)


if __name__ == "__main__":
    main()
