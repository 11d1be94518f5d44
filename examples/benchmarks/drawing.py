"""Drawing a workload beside simulating it, here and in another checkout, in one run.

    python examples/benchmarks/drawing.py --before /path/to/another/checkout --out docs/results

Seconds of processor time to draw jobs and to serve them under class mean and Gittins, and the
memory that the drawn workload needs, each cell in a process of its own and the two sides in turns.
Applications are those of the Hermes table, recorded coding sessions and, with `--data`, profiles of
the artifact (fewer jobs: drawing them one by one takes most of an hour). Writes `drawing.json`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from beside import started

ROOT = Path(__file__).parents[2]
POLICIES = ("ClassMean", "Gittins")
LOAD = 0.9


def applications(mix: str, data: Path) -> Any:
    """What the jobs of a mix are drawn from."""
    import demand
    from demand.traces import read_agent_sessions, read_hermes_artifact
    from demand.workloads import profiled_applications

    if mix == "Hermes table":
        return demand.hermes_applications()
    if mix == "artifact profiles":
        file = data / "hermes_artifact" / "task_models_skewnorm.json.gz"
        return profiled_applications(read_hermes_artifact(file))
    sessions = read_agent_sessions(data / "agent_sessions")
    runs = [session.run(leave_out=("human",)) for session in sessions]
    return demand.recorded_applications({"coding agent": runs}, split="time")


def memory() -> float:
    """Most mebibytes held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(mix: str, jobs: int, data: Path) -> None:
    """One cell, as a line of JSON."""
    import demand

    drawn_from = applications(mix, data)
    held, start = memory(), time.process_time()
    workload = demand.poisson_workload(drawn_from, LOAD, jobs)
    found = {"drawing": time.process_time() - start, "mebibytes": memory() - held}
    for name in POLICIES:
        start = time.process_time()
        result = demand.simulate(workload, getattr(demand, name)())
        found[name] = time.process_time() - start
        found[f"{name} mean"] = result.mean
    print(json.dumps(found), flush=True)


def table(record: dict[str, Any]) -> str:
    """As Markdown."""
    columns = {
        "drawn in": ("drawing", "{:.2f} s"),
        "memory": ("mebibytes", "{:,.0f} MiB"),
        "served by class mean in": ("ClassMean", "{:.2f} s"),
        "by Gittins in": ("Gittins", "{:.2f} s"),
    }
    heads = " | ".join(f"{head}, before | after" for head in columns)
    lines = [f"| jobs of | jobs | {heads} |", "| --- |" + " ---: |" * (1 + 2 * len(columns))]
    for row in record["rows"]:
        cells = [
            form.format(row[side][name])
            for name, form in columns.values()
            for side in ("before", "after")
        ]
        lines.append(f"| {row['mix']} | {row['jobs']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help="root of the checkout to hold this one against")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--jobs", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="directory for drawing.json")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.cell, arguments.jobs[0], arguments.data)
        return
    sides = {"before": arguments.before, "after": ROOT}
    cells = [("Hermes table", jobs) for jobs in arguments.jobs]
    cells += [("coding sessions", max(arguments.jobs)), ("artifact profiles", min(arguments.jobs))]
    rows = []
    for mix, jobs in cells:
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for turn in range(arguments.repeats if jobs <= 100_000 else 1):
            for side in list(sides)[:: 1 if turn % 2 else -1]:
                given = ["--cell", mix, "--jobs", str(jobs), "--data", str(arguments.data)]
                process = started(__file__, sides[side], given)
                found[side].append(json.loads(process.communicate()[0]))
        medians = {
            side: {name: statistics.median(one[name] for one in each) for name in each[0]}
            for side, each in found.items()
        }
        rows.append({"mix": mix, "jobs": jobs, **medians})
        print(rows[-1], flush=True)
    configuration = {
        "jobs": arguments.jobs, "repeats": arguments.repeats, "load": LOAD, "seed": 0,
        "before": _commit(arguments.before),
    }  # fmt: skip
    sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
    from environment import environment

    record = {"configuration": configuration, "environment": environment(), "rows": rows}
    print(table(record))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "drawing.json").write_text(json.dumps(record, indent=1) + "\n")


def _commit(checkout: Path) -> str:
    command = ["git", "rev-parse", "HEAD"]
    git = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    return git.stdout.strip() or "not a checkout"


if __name__ == "__main__":
    main()
