"""Time of Gittins ranks: one, a table of all ages, one age of it, and many applications at once.

    python examples/benchmarks/ranks.py --out docs/results

Each beside a straightforward implementation: the definition as a double loop over stops and atoms,
and ten equal-width stops in a loop over atoms, as the public Hermes artifact goes about it. Atoms
are lognormal samples (sigma 2), ages a random share of a random sample. Arms take turns in one
run; medians of processor time, so that a busy machine counts less. Writes `ranks.json`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import trange

from demand import Distribution, RankTable
from demand.distribution.rank_table import rank_many

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from environment import environment


def definition(values: list[float], weights: list[float], age: float) -> float:
    """The equation as a double loop: every stop, and for each stop every atom."""
    alive = [(x - age, w) for x, w in zip(values, weights, strict=True) if x > age]
    best = float("inf")
    for stop, _ in alive:
        spent = finished = 0.0
        for left, weight in alive:
            spent += weight * min(left, stop)
            if left <= stop:
                finished += weight
        best = min(best, spent / finished)
    return best


def ten_stops(values: list[float], weights: list[float], age: float) -> float:
    """Ten equal-width stops, each by a loop over the atoms; the artifact's numerator."""
    alive = [(x - age, w) for x, w in zip(values, weights, strict=True) if x > age]
    total = sum(weight for _, weight in alive)
    best = float("inf")
    for bucket in range(1, 11):
        stop = alive[-1][0] * bucket / 10
        spent = finished = 0.0
        for left, weight in alive:
            if left <= stop:
                spent += weight * left
                finished += weight
        if finished > 0.0:
            best = min(best, spent / finished / (finished / total))
    return best


@dataclass(frozen=True)
class Arm:
    """A call to time, and how many ranks, tables or queries it makes; `slow` for few turns."""

    call: Callable[[], object]
    number: int = 1
    slow: bool = False


def arms(atoms: int, running: int, seed: int) -> dict[str, Arm]:
    """What is timed, by name."""
    rng = np.random.default_rng(seed)
    known = [Distribution(rng.lognormal(0.0, 2.0, atoms)) for _ in range(9)]
    tables = [RankTable(d) for d in known]
    which = rng.integers(0, len(known), running)
    picked = np.stack([rng.choice(d.values, running) for d in known])
    ages = picked[which, np.arange(running)] * rng.random(running)
    d, table = known[0], tables[0]
    values, weights = d.values.tolist(), d.weights.tolist()
    costed = RankTable(d, quantum=0.5, preemption_cost=0.1)
    some = (rng.choice(d.values, 1000) * rng.random(1000)).tolist()
    over = (table(some) * rng.uniform(1.0, 2.0, len(some))).tolist()
    pairs = list(zip(some, over, strict=True))
    age = some[0]
    return {
        "one rank": Arm(lambda: [d.gittins(age) for _ in range(20)], 20),
        "one rank, ten stops in a loop": Arm(lambda: ten_stops(values, weights, age)),
        "one rank, definition in a loop": Arm(lambda: definition(values, weights, age), slow=True),
        "one table": Arm(lambda: [RankTable(d) for _ in range(5)], 5),
        "one table, mean": Arm(lambda: [RankTable(d, "mean") for _ in range(5)], 5),
        "one table, shifted": Arm(lambda: [RankTable(d, "shifted") for _ in range(5)], 5),
        "one table, quantum and cost": Arm(lambda: RankTable(d, quantum=0.5, preemption_cost=0.1)),
        "one table, bucketed": Arm(lambda: RankTable(d, "bucketed"), slow=True),
        "one table, one rank an atom": Arm(lambda: [d.gittins(a) for a in values], slow=True),
        f"{running} running, tables": Arm(lambda: rank_many(tables, which, ages)),
        f"{running} running, one rank each": Arm(
            lambda: [known[k].gittins(a) for k, a in zip(which, ages, strict=True)], slow=True
        ),
        "RankTable.at": Arm(lambda: [table.at(a) for a in some], len(some)),
        "RankTable.at, quantum and cost": Arm(lambda: [costed.at(a) for a in some], len(some)),
        "RankTable.next_above": Arm(lambda: [table.next_above(a, b) for a, b in pairs], len(some)),
    }


def seconds(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--atoms", type=int, default=1000)
    parser.add_argument("--running", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    timed = arms(args.atoms, args.running, args.seed)
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for turn in trange(args.repeats + 1, desc="turns"):
        for name, arm in timed.items():
            if not arm.slow or turn <= 5:
                samples[name].append(seconds(arm.call) / arm.number)
    samples = {name: times[1:] for name, times in samples.items()}  # the first was for warming up
    rows = [
        {
            "what": name,
            "median_microseconds": 1e6 * statistics.median(times),
            "fastest_microseconds": 1e6 * min(times),
            "turns": len(times),
        }
        for name, times in samples.items()
    ]
    record = {
        "configuration": {k: v for k, v in vars(args).items() if k != "out"},
        "environment": {**environment(), "numpy": np.__version__},
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "ranks.json").write_text(json.dumps(record, indent=1) + "\n")
    print("median us    fastest us  turns  what")
    for row in rows:
        print(
            f"{row['median_microseconds']:12,.2f}  {row['fastest_microseconds']:10,.2f}  "
            f"{row['turns']:5}  {row['what']}"
        )


if __name__ == "__main__":
    main()
