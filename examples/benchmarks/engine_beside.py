"""The engine simulator beside that of another checkout, in one run.

    python examples/benchmarks/engine_beside.py --before /path/to/another/checkout

Both serve the same jobs in turns, each in a process of its own; a cell is a load and a policy. The
ratio is that of the medians of processor time. Both must have the same completion times, so that
what policies know has to be the same in both. Prints a table and writes nothing.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from beside import asked, started

ROOT = Path(__file__).parents[2]
LOADS = {"10": (10.0, 300), "30": (30.0, 300), "50": (50.0, 300), "60": (60.0, 1000)}
POLICIES = ("FCFS", "Gittins", "LAS")


def serve() -> None:
    """Answer each cell with the seconds it took and the mean completion time."""
    from dataclasses import fields

    import demand
    from demand.simulation.engine import Engine, simulate_engine

    # Before there were two, all engines scheduled by rank.
    named = {each.name for each in fields(Engine)} & {"scheduling"}
    engine = Engine(blocks=65_536, preemption="pause", **dict.fromkeys(named, "by_rank"))

    mix = demand.hermes_applications()
    workloads = {
        name: demand.poisson_workload(mix, load, jobs, seed=0)
        for name, (load, jobs) in LOADS.items()
    }
    policies = {"FCFS": demand.FCFS(), "Gittins": demand.Gittins(), "LAS": demand.LAS(quantum=20.0)}
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        load, policy = line.split()
        start = time.process_time()
        result = simulate_engine(workloads[load], policies[policy], engine)
        took = time.process_time() - start
        print(json.dumps([took, result.mean]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help="root of the checkout to hold this one against")
    parser.add_argument("--after", type=Path, default=ROOT, help="the same of the other side")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    sides = {"before": arguments.before, "after": arguments.after}
    processes = {name: started(__file__, package, []) for name, package in sides.items()}
    for process in processes.values():
        asked(process)
    cells = [f"{load} {policy}" for load in LOADS for policy in POLICIES]
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(arguments.repeats):
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
        before, after = (statistics.median(seconds[name, cell]) for name in ("before", "after"))
        print(f"{cell:12} {before:8.4f} s  {after:8.4f} s  {after / before:6.3f}")


if __name__ == "__main__":
    main()
