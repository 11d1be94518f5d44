"""What learning from a run and asking in mid-unit cost, beside another checkout, in one run.

    python examples/benchmarks/estimator.py --out docs/results --before PATH_OF_ANOTHER_CHECKOUT

An estimator knows the first half of the coding agents (`../shared/data`). It observes the runs of
the second half one by one, and is asked twice after each what is left after the first unit. The
second time nothing is prepared any more: so the seconds of the observation and of the first
question, less those of the second, are what an observation costs with its share of what is prepared
anew. The other checkout does so for the first few runs, all of which cost it alike. Then questions
in mid-unit, at rising ages. Both packages take turns, each in a process of its own; the seconds are
those of the processor. Writes `estimator.json`.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from beside import asked, started
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
REFINEMENTS = ("NoRefinement", "WholeRuns", "CurrentUnit", "ProgressRegression",
               "NearestRuns", "PearsonFilter")  # fmt: skip
ASKED = 25
"""Questions in mid-unit."""


def agents(data: Path) -> list[Any]:
    """The runs of the coding agents, in the order of their numbers."""
    from demand.traces import read_agent_sessions

    sessions = read_agent_sessions(data / "agent_sessions" / "sessions.jsonl.gz")
    runs = (session.run(leave_out=("human",)) for session in sessions)
    return [run for run in runs if run]


def turn(runs: list[Any], name: str, observed: int) -> dict[str, float]:
    """Milliseconds of an observation, of a question between units and of one in mid-unit."""
    import demand

    learned = len(runs) // 2
    refinement = getattr(demand, name)()
    estimator = demand.DemandEstimator({"agent": demand.PDGraph.fit(runs[:learned])}, refinement)
    estimator("agent", demand.Progress(runs[0][:1]))
    both = between = 0.0
    for run in runs[learned : learned + observed]:
        progress = demand.Progress(run[:1])
        start = time.process_time()
        estimator.observe("agent", run)
        estimator("agent", progress)
        middle = time.process_time()
        estimator("agent", progress)
        both += middle - start
        between += time.process_time() - middle
    seconds = []
    for age in range(ASKED):
        executed, unit = runs[-1][: age % 5], runs[-1][age % 5].unit.name
        progress = demand.Progress(executed, current=unit, attained_seconds=0.5 + age)
        start = time.process_time()
        estimator("agent", progress)
        seconds.append(time.process_time() - start)
    return {
        "observe": 1e3 * (both - between) / observed,
        "between_units": 1e3 * between / observed,
        "mid_unit": 1e3 * statistics.median(seconds),
    }


def serve(data: Path) -> None:
    """Answer "name observed" with a turn."""
    runs = agents(data)
    print(json.dumps(len(runs)), flush=True)
    for line in sys.stdin:
        name, observed = line.split()
        print(json.dumps(turn(runs, name, int(observed))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--before", type=Path, help="root of the checkout to compare with")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--observed-before", type=int, default=8)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.data)
        return
    roots = {"before": args.before, "after": ROOT}
    given = ["--data", str(args.data.resolve())]
    served = {name: started(__file__, root, given) for name, root in roots.items()}
    known = [asked(process) for process in served.values()]
    observed = {"before": args.observed_before, "after": known[0] - known[0] // 2}
    turns: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in tqdm(range(args.turns), desc="turns"):
        for refinement in REFINEMENTS:
            for name, process in served.items():
                found = asked(process, f"{refinement} {observed[name]}")
                turns.setdefault((refinement, name), []).append(found)
    for process in served.values():
        process.communicate()
    rows = [
        {"refinement": refinement}
        | {
            name: {
                what: statistics.median(found[what] for found in turns[refinement, name])
                for what in ("observe", "between_units", "mid_unit")
            }
            for name in served
        }
        for refinement in REFINEMENTS
    ]
    sys.path.insert(0, str(ROOT / "examples" / "experiments"))  # scripts, not a package
    import demand_tables
    from environment import environment

    record = {
        "configuration": {
            "learned": known[0] // 2,
            "observed": observed["after"],
            "observed_before": args.observed_before,
            "turns": args.turns,
            "seed": "that of the refinements, 0",
        },
        "environment": environment(),
        "rows": rows,
    }
    print(demand_tables.estimator(record))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "estimator.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
