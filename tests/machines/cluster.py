"""A Ray cluster of two processors on this machine, started for the tests and ended after them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports below those that Ray's workers take."""
    found: list[int] = []
    port = 9200 + os.getpid() % 700
    while len(found) < count:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                found.append(port)
        port += 1
    return found


@contextmanager
def local_cluster(folder: Path, processors: int = 2) -> Iterator[str]:
    """The address of its client server; ends what it started."""
    port, client = free_ports(2)
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
        f"--num-cpus={processors}", f"--port={port}", f"--ray-client-server-port={client}",
        "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats",
        f"--temp-dir={folder}",
    ]  # fmt: skip
    head = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(client, head)
        yield f"ray://127.0.0.1:{client}"
    finally:
        head.terminate()  # --block ends the processes of the node with this one
        head.wait(60)


def _wait_for(port: int, head: "subprocess.Popen[bytes]", seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if head.poll() is not None:
            raise RuntimeError(f"ray start ended with {head.returncode}")
        with socket.socket() as tried:
            if not tried.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.2)
    raise RuntimeError(f"no client server at port {port} after {seconds} s")
