"""Speed and memory of the simulator, and how both grow.

    python examples/benchmarks/simulator.py --out docs/results

Events a second (of processor time) for four policies on two mixes, from ten thousand jobs to a
million, and for others up to a hundred thousand; the memory that simulating adds; a hundred
thousand jobs on several servers, each as loaded as the one; and a few jobs served by a
straightforward simulator that ranks and sorts everyone present whenever anything could have
changed. True demands are drawn with replacement from a thousand runs of each application. Every
cell runs in a process of its own.
Writes `simulator.json`.
"""

import argparse
import json
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from demand import (
    FCFS,
    LAS,
    SERPT,
    VTC,
    Aging,
    Application,
    ClassMean,
    Gittins,
    Hysteresis,
    Job,
    LeastSlack,
    Policy,
    PriorityClasses,
    Workload,
    bimodal_applications,
    hermes_applications,
    poisson_workload,
    simulate,
    with_deadlines,
)
from demand.simulation.job_maker import JobMaker

POLICIES = {"FCFS": FCFS(), "ClassMean": ClassMean(), "SERPT": SERPT(), "Gittins": Gittins()}
OTHERS: dict[str, Policy] = {
    "LAS(10)": LAS(10.0),
    "Gittins(preemption_cost=1)": Gittins(preemption_cost=1.0),
    "Hysteresis(Gittins, 10)": Hysteresis(Gittins(), 10.0),
    "Aging(Gittins, 600, 0.5)": Aging(Gittins(), 600.0, 0.5),
    "PriorityClasses(Gittins)": PriorityClasses(Gittins()),
    "LeastSlack(quantum=10)": LeastSlack(quantum=10.0),
    "VTC(10)": VTC(10.0),
}
SEVERAL = (*POLICIES, "LAS(10)")
OTHERS_JOBS = 100_000  # at most
MIXES = {"hermes_mix": (hermes_applications, 0.9), "bimodal_mix": (bimodal_applications, 0.8)}
RUNS = 1000


def drawing(applications: Sequence[Application], seed: int) -> list[Application]:
    """The applications, their demands drawn with replacement from `RUNS` runs of each."""
    drawn = []
    for application in applications:
        runs = application.demands(np.random.default_rng(seed), RUNS)
        sample = lambda rng, n, runs=runs: rng.choice(runs, n)  # noqa: E731
        drawn.append(replace(application, sample_runs=None, sample=sample))
    return drawn


def resorting(workload: Workload, policy: Policy) -> np.ndarray:
    """Completion times on one server, by ranking and sorting all jobs at every possible change.

    That is at every arrival, every completion and, where ranks depend on age, every atom of the
    running job.
    """
    maker = JobMaker(workload, policy, Job)
    atoms = {
        name: known.values.tolist() if policy.table(known) else []
        for name, known in workload.distributions.items()
    }
    arrivals = [*workload.arrivals.tolist(), math.inf]
    finish = np.empty(len(workload))
    present, arrived, now = [], 0, 0.0
    while present or arrived < len(workload):
        if not present:
            now = arrivals[arrived]
        while arrivals[arrived] <= now:
            present.append(maker.make(arrived))
            arrived += 1
        present.sort(key=lambda job: (policy.rank(job, now), job.index))
        job = present[0]
        stop = min(
            [job.demand, *(atom for atom in atoms[job.application] if atom > job.attained_service)]
        )
        end = now + (stop - job.attained_service)
        if arrivals[arrived] < end:
            job.attained_service += arrivals[arrived] - now
            now = arrivals[arrived]
            continue
        job.attained_service, now = stop, end
        if stop == job.demand:
            finish[job.index] = now
            present.remove(job)
    return finish - workload.arrivals


def with_all(workload: Workload, seed: int) -> Workload:
    """The same jobs due 1.5 times their demand after arrival, in three classes of priority."""
    priorities = np.random.default_rng(seed).integers(3, size=len(workload)).tolist()
    return replace(with_deadlines(workload, 1.5), priorities=priorities)


def cell(mix: str, name: str, workload: Workload, repeats: int, servers: int = 1) -> dict[str, Any]:
    """One policy on one workload."""
    policy = {**POLICIES, **OTHERS}[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = simulate(workload, policy, servers)
        seconds.append(time.process_time() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "mix": mix,
        "policy": name,
        "servers": servers,
        "jobs": len(workload),
        "events": result.events,
        "preemptions": result.preemptions,
        "mean_seconds": result.mean,
        "processor_seconds": statistics.median(seconds),
        "events_per_second": result.events / statistics.median(seconds),
        "fastest_events_per_second": result.events / min(seconds),
        "peak_mebibytes": after / 1024,
        "added_mebibytes": (after - before) / 1024,
    }


def beside_resorting(mix: str, name: str, workload: Workload, repeats: int) -> dict[str, Any]:
    """The simulator and the straightforward one in turns."""
    policy = POLICIES[name]
    ours, plain = [], []
    for _ in range(repeats):
        start = time.process_time()
        result = simulate(workload, policy)
        ours.append(time.process_time() - start)
        start = time.process_time()
        expected = resorting(workload, policy)
        plain.append(time.process_time() - start)
    np.testing.assert_allclose(result.completion_times, expected, rtol=1e-6, atol=1e-6)
    return {
        "mix": mix,
        "policy": name,
        "jobs": len(workload),
        "processor_seconds": statistics.median(ours),
        "resorting_processor_seconds": statistics.median(plain),
        "ratio": statistics.median(p / o for p, o in zip(plain, ours, strict=True)),
    }


def alone(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call `function` in a process of its own, which shares what is there already."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--servers", type=int, nargs="+", default=[2, 4, 8, 32])
    parser.add_argument("--beside", type=int, default=200, help="jobs of the comparison")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="directory for simulator.json")
    arguments = parser.parse_args()
    growth, others, several, beside = [], [], [], []
    columns = len(arguments.jobs) + len(arguments.servers) + 1
    with tqdm(total=len(MIXES) * columns, disable=None) as progress:
        for mix, (applications, load) in MIXES.items():
            pooled = drawing(applications(), arguments.seed)
            for jobs in arguments.jobs:
                workload = poisson_workload(pooled, load, jobs, arguments.seed)
                repeats = arguments.repeats if jobs <= OTHERS_JOBS else 1
                growth += [alone(cell, mix, name, workload, repeats) for name in POLICIES]
                if jobs <= OTHERS_JOBS:
                    full = with_all(workload, arguments.seed)
                    others += [alone(cell, mix, name, full, repeats) for name in OTHERS]
                progress.update()
            for servers in arguments.servers:
                workload = poisson_workload(
                    pooled, load, OTHERS_JOBS, arguments.seed, servers=servers
                )
                several += [
                    alone(cell, mix, name, workload, arguments.repeats, servers) for name in SEVERAL
                ]
                progress.update()
            workload = poisson_workload(pooled, load, arguments.beside, arguments.seed)
            beside += [
                alone(beside_resorting, mix, name, workload, arguments.repeats) for name in POLICIES
            ]
            progress.update()
    print(
        f"{'mix':12} {'policy':26} {'servers':>7} {'jobs':>9} {'events':>9} {'events/s':>10} "
        f"{'added MiB':>10}"
    )
    for row in growth + others + several:
        print(
            f"{row['mix']:12} {row['policy']:26} {row['servers']:7} {row['jobs']:9} "
            f"{row['events']:9} {row['events_per_second']:10.0f} {row['added_mebibytes']:10.1f}"
        )
    print(f"\n{'mix':12} {'policy':10} {'jobs':>9} {'s':>9} {'re-sorting s':>13} {'ratio':>7}")
    for row in beside:
        print(
            f"{row['mix']:12} {row['policy']:10} {row['jobs']:9} {row['processor_seconds']:9.4f} "
            f"{row['resorting_processor_seconds']:13.3f} {row['ratio']:7.1f}"
        )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        # Only here: it loads torch, whose memory is none of the simulator's.
        sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
        from environment import environment

        configuration = {k: v for k, v in vars(arguments).items() if k != "out"}
        loads = {mix: load for mix, (_, load) in MIXES.items()}
        found = {
            "configuration": configuration | {"load": loads, "runs": RUNS},
            "environment": environment(),
            "growth": growth,
            "others": others,
            "several": several,
            "beside_resorting": beside,
        }
        (arguments.out / "simulator.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
