"""A sweep in one process, over processes by joblib, and on a Ray cluster started on this machine.

    python examples/benchmarks/sweeps.py --out docs/results

`demand.compare` of four policies on the mix of the Hermes paper, seed by seed. Each way runs the
sweep twice: the first time counts what has to be started (the processes, the connection to the
cluster), the second time what stays is there. Starting the cluster itself is not counted. The
numbers of all ways must be the same to the bit, or nothing is written. Ray is left out where it is
not installed. Writes `sweeps.json`.
"""

import argparse
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from environment import environment

from demand import SERPT, ClassMean, Gittins, Oracle, compare, hermes_mix

POLICIES = [ClassMean(), SERPT(), Gittins(), Oracle()]


@contextmanager
def cluster(processors: int) -> Iterator[str]:
    """The address of a Ray cluster of this machine, which this process leaves before it ends."""
    import ray

    port, client = _free_ports(2)
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # a short path: sockets are in it
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
            f"--num-cpus={processors}", f"--port={port}", f"--ray-client-server-port={client}",
            "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats",
            f"--temp-dir={folder}",
        ]  # fmt: skip
        # The client server forks a process for each connection, and gRPC, which goes on in a fork
        # unless told otherwise, at times crashes it before it has begun (Ray's issue 63202).
        variables = os.environ | {"GRPC_ENABLE_FORK_SUPPORT": "0"}
        quiet = subprocess.DEVNULL
        head = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=variables)
        try:
            _wait_for(client, head)
            yield f"ray://127.0.0.1:{client}"
        finally:
            ray.shutdown()  # before: a client would try for half a minute to reach it again
            head.terminate()  # --block ends the processes of the node with this one
            head.wait(60)


def _free_ports(count: int) -> list[int]:
    """Ports below those that Ray's workers take."""
    found: list[int] = []
    port = 9200 + os.getpid() % 700
    while len(found) < count:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                found.append(port)
        port += 1
    return found


def _wait_for(port: int, head: "subprocess.Popen[bytes]", seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if head.poll() is not None:
            raise SystemExit(f"ray start ended with {head.returncode}")
        with socket.socket() as tried:
            if not tried.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.2)
    raise SystemExit(f"no client server at port {port} after {seconds} s")


def timed(jobs: int, seeds: int, workers: int | str, progress: bool = True) -> tuple[float, str]:
    """Seconds of a sweep, and all that it measured."""
    begun = time.perf_counter()
    draw = partial(hermes_mix, load=0.9, jobs=jobs)
    result = compare(draw, POLICIES, range(seeds), workers=workers, progress=progress)
    return time.perf_counter() - begun, result.to_json()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--jobs", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    ways: dict[str, list[float]] = {}
    found = set()

    def measure(name: str, workers: int | str) -> None:
        for _ in range(2):
            seconds, numbers = timed(args.jobs, args.seeds, workers)
            ways.setdefault(name, []).append(seconds)
            found.add(numbers)

    timed(20, 2, 1, progress=False)  # what is computed once in a process
    measure("one process", 1)
    measure(f"{args.processes} processes, joblib", args.processes)
    if importlib.util.find_spec("ray"):
        with cluster(args.processes) as address:
            measure(f"Ray, {args.processes} processors", address)
    if len(found) != 1:
        raise SystemExit(f"{len(found)} different results: they must be one")
    record = {
        "configuration": {
            "jobs": args.jobs, "seeds": args.seeds, "load": 0.9, "processes": args.processes,
            "policies": [repr(policy) for policy in POLICIES],
            "runs": args.seeds * (1 + len(POLICIES)),
        },
        "environment": environment() | {"load_average_before": load},
        "seconds": {name: {"first": each[0], "again": each[1]} for name, each in ways.items()},
        "the_same_numbers": True,
    }  # fmt: skip
    print(table(record))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sweeps.json").write_text(json.dumps(record, indent=1) + "\n")


def table(record: dict) -> str:
    """As Markdown."""
    lines = ["| | first sweep | the next one |", "| --- | ---: | ---: |"]
    for name, seconds in record["seconds"].items():
        lines.append(f"| {name} | {seconds['first']:.1f} s | {seconds['again']:.1f} s |")
    asked = record["configuration"]
    busy = record["environment"]["load_average_before"]
    return "\n".join(lines) + (
        f"\n\n{asked['runs']} runs: {asked['seeds']} seeds of {asked['jobs']} jobs under FCFS and "
        f"{len(asked['policies'])} policies; the same numbers to the bit. Load of the "
        f"machine before: {busy:.1f}.\n"
    )


if __name__ == "__main__":
    main()
