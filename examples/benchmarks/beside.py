"""The package of another checkout beside this one's: each in a process that is asked for turns.

A process runs the same script with ``--serve``, says in a line of JSON that it is ready, and then
answers each name it is given with a line of JSON.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# On a machine that others use, too, the processor's time of one thread (OMP_NUM_THREADS=1) is what
# a piece of work takes by itself.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def started(script: str, package: Path, given: list[str]) -> "subprocess.Popen[str]":
    """A process in which `script` serves the packages of a checkout."""
    command = [sys.executable, script, *given, "--serve"]
    # Threads that wait asleep: on a shared machine a busy wait takes the core that others need.
    env = os.environ | {"PYTHONPATH": str(package.resolve()), "OMP_WAIT_POLICY": "passive"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)


def asked(process: "subprocess.Popen[str]", name: str | None = None) -> Any:
    """The next line of a process, once it was asked for an arm's turn."""
    assert process.stdin is not None
    assert process.stdout is not None
    if name is not None:
        process.stdin.write(name + "\n")
        process.stdin.flush()
    return json.loads(process.stdout.readline())
