"""A scheduler that knows nothing and learns from what it serves: how soon is it worth it?

    python examples/experiments/learning_loop.py --out docs/results

The mix of the Hermes paper by its table, nine applications, arrives at load 0.9 at one preemptive
server. Gittins starts with an empty estimator, as in an adapter: a job is ranked by attained
service until the first of its application has ended, then by what was learned, as it arrives with a
call and at the end of each of its units; each job that ends is observed. Beside it the same with
graphs from the start, the class mean, and what knows nothing. Mean completion is over that of first
come, first served, in quarters of the jobs by arrival, with 95 % bootstraps over the seeds. Writes
`learning_loop.json`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from environment import environment
from workers import add_workers

from demand import (
    FCFS,
    LAS,
    NEVER_SEEN,
    ClassMean,
    DemandEstimator,
    Execution,
    Gittins,
    Job,
    Oracle,
    RandomOrder,
    WholeRuns,
    Workload,
    bootstrap_interval,
    hermes_mix,
    simulate,
)
from demand.policies.base import Rank
from demand.policies.wrapper import Wrapper
from demand.sweep import spread

QUARTERS = 4


@dataclass(frozen=True)
class Observing(Wrapper):
    """The policy within; an estimator observes the run of each job that ends.

    Args:
        policy: ranks.
        estimator: observes.
        runs: by order of arrival.
    """

    estimator: DemandEstimator
    runs: Sequence[Sequence[Execution]]

    def rank(self, job: Job, now: float) -> Rank:
        """That of the policy within."""
        return self.policy.rank(job, now)

    def next_above(self, job: Job, threshold: Rank) -> float:
        """That of the policy within."""
        return self.policy.next_above(job, threshold)

    def departed(self, job: Job, now: float) -> None:
        """Observe it."""
        self.policy.departed(job, now)
        self.estimator.observe(job.application, self.runs[job.index])


def served(workload: Workload) -> dict[str, np.ndarray]:
    """Completion seconds of all jobs, by arm."""
    assert workload.runs is not None
    mean = float(workload.demands.mean())
    knowing = DemandEstimator(workload.graphs, WholeRuns(), lag=1e9)
    learning = DemandEstimator({}, WholeRuns())
    unknown = replace(
        workload, distributions=dict.fromkeys(workload.distributions, NEVER_SEEN), graphs={}
    )
    told = partial(simulate, unknown, Observing(Gittins(), learning, workload.runs))
    results = {
        "FCFS": simulate(workload, FCFS()),
        "random order": simulate(workload, RandomOrder()),
        "LAS": simulate(workload, LAS(mean / 100)),
        "Gittins, learning from nothing": told(estimator=learning, predictor=learning),
        "Gittins, graphs from the start": simulate(workload, Gittins(), estimator=knowing),
        "class mean": simulate(workload, ClassMean()),
        "oracle": simulate(workload, Oracle()),
    }
    return {name: result.completion_times for name, result in results.items()}


def served_of_seed(jobs: int, seed: int) -> dict[str, np.ndarray]:
    """The same of the mix that is drawn of a seed."""
    return served(hermes_mix(load=0.9, jobs=jobs, seed=seed))


def experiment(jobs: int, seeds: int, workers: int | str) -> dict:
    """By arm: ratios to FCFS of each quarter, and of all jobs, with intervals over the seeds."""
    rows = list(spread(partial(served_of_seed, jobs), range(seeds), workers, what="seeds"))
    found: dict[str, list[list[float]]] = {}
    for name in rows[0]:
        parts = [*(partial(_quarter, at) for at in range(QUARTERS)), lambda times: times]
        intervals = [
            bootstrap_interval([part(r[name]).mean() / part(r["FCFS"]).mean() for r in rows])
            for part in parts
        ]
        found[name] = [[each.estimate, each.low, each.high] for each in intervals]
    return found


def _quarter(at: int, times: np.ndarray) -> np.ndarray:
    return np.array_split(times, QUARTERS)[at]


def markdown(record: dict) -> str:
    """The table of docs/learning.md, from the JSON."""
    head = [f"{at}. quarter" for at in range(1, QUARTERS + 1)]
    lines = [
        f"| mean over FCFS's | {' | '.join(head)} | all |",
        "| --- |" + " ---: |" * (QUARTERS + 1),
    ]
    for name, row in record["results"].items():
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*each) for each in row]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    ran = record["configuration"]
    return "\n".join(lines) + f"\n\n{ran['seeds']} seeds of {ran['jobs']} jobs at load 0.9.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--jobs", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=12)
    add_workers(parser)
    args = parser.parse_args()
    record = {
        "configuration": {"jobs": args.jobs, "seeds": args.seeds, "load": 0.9},
        "environment": environment(),
        "results": experiment(args.jobs, args.seeds, args.workers),
    }
    print(markdown(record))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "learning_loop.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
