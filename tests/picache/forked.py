"""Children of this process that write and are killed: torch and the package are loaded already."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

SECONDS = 60
"""How long a child lives at most."""


@dataclass(frozen=True)
class Child:
    """A forked process: what it says, and a word to it."""

    pid: int
    says: BinaryIO
    hears: BinaryIO

    def line(self) -> bytes:
        """What it says next; empty when it has ended."""
        return self.says.readline()

    def go_on(self) -> None:
        """Let it go on, where it has not ended."""
        with suppress(BrokenPipeError):
            self.hears.write(b".")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit status, negative for the signal that ended it."""
        _, status = os.waitpid(self.pid, 0)
        self.says.close()
        self.hears.close()
        return os.waitstatus_to_exitcode(status)


def forked(work: Callable[[Callable[[], None]], None]) -> Child:
    """A child that runs `work(stop)` and ends, without returning to pytest.

    `stop()` says a line and waits until the parent lets it go on. It ends where the parent has, and
    after `SECONDS` at the latest, also where it waits for a lock that a thread of the parent held.
    """
    says, hears = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(says[0])
        os.close(hears[1])
        signal.alarm(SECONDS)
        status = 1
        try:

            def stop() -> None:
                os.write(says[1], b"there\n")
                if not os.read(hears[0], 1):
                    os._exit(1)  # the parent is gone

            work(stop)
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)
    os.close(says[1])
    os.close(hears[0])
    return Child(pid, os.fdopen(says[0], "rb"), os.fdopen(hears[1], "wb", buffering=0))
