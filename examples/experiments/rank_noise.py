"""How far Gittins ranks of samples are from those of the demand they were drawn from.

    python examples/experiments/rank_noise.py --out docs/results

The raw rank, the one on a grid ("shifted") and that of ten stops ("bucketed"), at ages from the
least demand to the upper quartile, over seeds, on demands whose rank is known in closed form.
Writes `rank_noise.json`; the table gives the factor that a rank is off by (geometric mean).
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demand import Distribution, RankTable

sys.path.insert(0, str(Path(__file__).parent))  # scripts, not a package
from environment import environment

RANKS = ("gittins", "shifted", "bucketed")


@dataclass(frozen=True)
class Demand:
    """A demand by its sampler, its exact rank by age, and the ages to look at."""

    sample: Callable[[np.random.Generator, int], np.ndarray]
    rank: Callable[[np.ndarray], np.ndarray]
    ages: tuple[float, float]


DEMANDS = {
    "exponential, mean 1": Demand(
        lambda rng, n: rng.exponential(size=n), np.ones_like, (0.0, float(np.log(4.0)))
    ),
    "uniform, 0 to 1": Demand(lambda rng, n: rng.random(n), lambda a: (1.0 - a) / 2.0, (0.0, 0.75)),
    "Pareto, index 1.5, at least 1": Demand(
        lambda rng, n: 1.0 + rng.pareto(1.5, n), lambda a: a / 1.5, (1.0, 4.0 ** (1 / 1.5))
    ),
}


def factors(demand: Demand, samples: int, seeds: int, rank: str) -> np.ndarray:
    """`[seeds, ages]` estimated rank over exact rank."""
    ages = np.linspace(*demand.ages, 21)
    drawn = (demand.sample(np.random.default_rng(seed), samples) for seed in range(seeds))
    ranks = [RankTable(Distribution(values), rank)(ages) for values in drawn]
    return np.array(ranks) / demand.rank(ages)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 350, 2000])
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    rows = [
        {
            "demand": name,
            "samples": samples,
            "rank": rank,
            "factor": float(np.exp(np.abs(np.log(off)).mean())),
            "median_ratio": float(np.median(off)),
        }
        for name, demand in DEMANDS.items()
        for samples in args.samples
        for rank in RANKS
        for off in [factors(demand, samples, args.seeds, rank)]
    ]
    record = {
        "configuration": {"samples": args.samples, "seeds": args.seeds, "ages": 21},
        "environment": {**environment(), "numpy": np.__version__},
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rank_noise.json").write_text(json.dumps(record, indent=1) + "\n")
    print("off by a factor of   median ratio  samples  rank      demand")
    for row in rows:
        print(
            f"{row['factor']:18.2f}  {row['median_ratio']:13.2f}  {row['samples']:7}  "
            f"{row['rank']:8}  {row['demand']}"
        )


if __name__ == "__main__":
    main()
