"""Coding agents on an engine that keeps their KV between calls, by several rules.

    python examples/experiments/prefix_reuse.py --data FOLDER --out docs/results

`FOLDER` holds agent_sessions/sessions.jsonl.gz (see docs/traces.md). Demand graphs learn from the
first half of the sessions; every session of the second half is served once, its calls with the
prompt tokens that they share with the call before (`Session.with_growing_prompts`), at Poisson
arrivals and in random order, which the seeds draw. What people and tools take between calls is as
recorded. Each rule serves the same jobs of a seed; intervals are over seeds. Writes
`prefix_reuse.json` and `prefix_reuse.png`.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from demand import (
    CostModel,
    Distribution,
    Gittins,
    PDGraph,
    Policy,
    Workload,
    bootstrap_interval,
    paired_ratio_interval,
)
from demand.policies import RequestFCFS
from demand.simulation.engine import (
    LRU,
    Engine,
    EngineResult,
    KeepAll,
    NextUse,
    Retention,
    simulate_engine,
)
from demand.simulation.engine.retention import LeftKV
from demand.sweep import spread
from demand.traces import read_agent_sessions
from demand.units import Execution

sys.path.insert(0, str(Path(__file__).parent))  # scripts, not a package
import engine_tables
from environment import environment
from workers import add_workers

APPLICATION = "coding_agent"
ASSUMED = {"human": 10.0, "tool": 10.0}
"""Seconds between calls where the trace has none: its median."""


@dataclass(frozen=True)
class Shuffled(Retention):
    """What is given up first is drawn at random, once for each call: the baseline of any rule."""

    def rank(self, left: LeftKV, now: float) -> float:
        """A number that looks random and is the same whenever it is asked for."""
        return float((left.used * 2654435761) % (1 << 32))


ARMS: dict[str, Retention | None] = {
    "drop all": None,
    "random": Shuffled(),
    "LRU": LRU(),
    "keep all, 50 % of blocks": KeepAll(0.5),
    "keep all, 90 % of blocks": KeepAll(0.9),
    "next use": NextUse(),
    "next use, held up to 30 s": NextUse(price=30.0, limit=0.5),
    "next use, held up to 300 s": NextUse(price=300.0, limit=0.5),
}
BOUND = "room for all"
"""LRU with so many blocks that nothing is given up: no rule can find more."""
POLICIES: dict[str, Policy] = {"request FCFS": RequestFCFS(), "Gittins": Gittins()}
SERVED = ((1500.0, "request FCFS"), (900.0, "request FCFS"), (900.0, "Gittins"))
"""Mean seconds between arrivals, and the policy."""


def engine(args: argparse.Namespace, retention: Retention | None) -> Engine:
    return Engine(
        max_requests=args.width,
        token_budget=args.token_budget,
        blocks=args.blocks,
        block_tokens=args.block_tokens,
        preemption="none",
        retention=retention,
    )


def workloads(args: argparse.Namespace, seconds_between_arrivals: float) -> list[Workload]:
    """The second half of the sessions, once each, for each seed."""
    path = args.data / "agent_sessions" / "sessions.jsonl.gz"
    runs: list[list[Execution]] = [
        session.with_growing_prompts().run(prompt="shared", assumed_seconds=ASSUMED)
        for session in read_agent_sessions(path)
    ][: args.sessions]
    half = len(runs) // 2
    cost = CostModel()
    graph = PDGraph.fit(runs[:half], name=APPLICATION, window=half, cost=cost)
    known = Distribution([_service(run, cost) for run in runs[:half]])
    found = []
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        served = [runs[half + at] for at in rng.permutation(len(runs) - half)]
        arrivals = np.cumsum(rng.exponential(seconds_between_arrivals, len(served)))
        found.append(
            Workload(
                arrivals,
                [_service(run, cost) for run in served],
                [APPLICATION] * len(served),
                {APPLICATION: known},
                runs=served,
                graphs={APPLICATION: graph},
            )
        )
    return found


def serve(drawn: list[Workload], policy: Policy, arm: Engine) -> list[EngineResult]:
    """A result for each seed."""
    return [simulate_engine(w, policy, arm, seed=i) for i, w in enumerate(drawn)]


def _service(run: list[Execution], cost: CostModel) -> float:
    return sum(cost.seconds(execution) for execution in run)


def outside(run: list[Execution]) -> float:
    """Seconds that a run takes outside of the engine."""
    return sum(e.seconds for e in run if e.unit.kind != "llm" and e.seconds is not None)


def figures(results: list[EngineResult], baseline: list[EngineResult]) -> dict:
    """Over seeds; waiting is what is left of a completion without the seconds outside."""

    def over(values: list[float]) -> dict:
        return bootstrap_interval(values)._asdict()

    def in_engine(result: EngineResult) -> np.ndarray:
        assert result.workload.runs is not None
        return result.completion_times - [outside(run) for run in result.workload.runs]

    means = [float(in_engine(r).mean()) for r in results]
    before = [float(in_engine(r).mean()) for r in baseline]
    return {
        "hit_rate": over([r.prefixes.found / max(r.prefixes.looked_up, 1) for r in results]),
        "of_findable": over([r.prefixes.found / max(r.prefixes.findable, 1) for r in results]),
        "mean_seconds": over([r.mean for r in results]),
        "p95_seconds": over([r.quantile(0.95) for r in results]),
        "mean_in_engine_seconds": over(means),
        "p95_in_engine_seconds": over([float(np.quantile(in_engine(r), 0.95)) for r in results]),
        "mean_in_engine_over_lru": paired_ratio_interval(means, before)._asdict(),
        "p95_ttft_seconds": over([r.requests.ttft_quantile(0.95) for r in results]),
        "busy_seconds": over([r.busy_seconds for r in results]),
        "held_blocks": over([r.prefixes.held_block_seconds / r.busy_seconds for r in results]),
        "jobs": len(results[0].completion_times),
        "requests": len(results[0].requests),
    }


def picture(rows: list[dict], path: Path) -> None:
    """Seconds in the engine by what was found."""
    import matplotlib.pyplot as plt

    canvas, ax = plt.subplots(figsize=(7.0, 4.2), layout="constrained")
    for (seconds, policy), marker in zip(SERVED, "^os", strict=False):
        served = (seconds, policy)
        chosen = [r for r in rows if (r["seconds_between_arrivals"], r["policy"]) == served]
        for at, row in enumerate(chosen):
            ax.plot(
                100.0 * row["hit_rate"]["estimate"],
                row["mean_in_engine_seconds"]["estimate"],
                marker,
                color=f"C{at}",
                label=row["retention"] if marker == "^" else None,
            )
    ax.set(xlabel="prompt tokens found, %", ylabel="mean seconds in the engine", yscale="log")
    said = "Arrivals 1,500 s apart: triangles; 900 s: circles request FCFS, squares Gittins"
    ax.set_title(said, fontsize="medium")
    ax.legend(fontsize="small")
    canvas.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--sessions", type=int, default=None, help="at most; all if left out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--blocks", type=int, default=16_384)
    parser.add_argument("--block-tokens", type=int, default=64)
    add_workers(parser)
    args = parser.parse_args()
    begun = time.perf_counter()
    arms = {
        **{name: engine(args, retention) for name, retention in ARMS.items()},
        BOUND: replace(engine(args, LRU()), blocks=64 * args.blocks),
    }
    rows = []
    for seconds, policy in SERVED:
        drawn = workloads(args, seconds)
        what = f"{policy}, {seconds:.0f} s"
        task = partial(serve, drawn, POLICIES[policy])
        found = spread(task, list(arms.values()), args.workers, what=what)
        served = dict(zip(arms, found, strict=True))
        of = {"seconds_between_arrivals": seconds, "policy": policy}
        rows += [
            of | {"retention": name} | figures(results, served["LRU"])
            for name, results in served.items()
        ]
    record = {
        "configuration": {
            **{
                name: value
                for name, value in vars(args).items()
                if name not in ("out", "data", "workers")
            },
            "engine": asdict(engine(args, None)),
            "retentions": {name: repr(retention) for name, retention in ARMS.items()},
            "assumed_seconds": ASSUMED,
            "served": SERVED,
        },
        "environment": environment(),
        "rows": rows,
        "seconds": time.perf_counter() - begun,
    }
    print(engine_tables.prefix_reuse(record))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "prefix_reuse.json").write_text(json.dumps(record, indent=1) + "\n")
    picture(rows, args.out / "prefix_reuse.png")


if __name__ == "__main__":
    main()
