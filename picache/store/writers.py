"""Who writes a temporary file, and whether that process has ended.

A temporary file's name says how many bytes it may grow to and which process writes it, so that
whoever needs room can tell what a killed writer left from what is being written just now.
"""

import os
import re
import uuid
from functools import cache
from hashlib import sha256
from pathlib import Path

TEMPORARY = re.compile(r"\..*\.tmp")
_WRITTEN = re.compile(r"\..*\.(\d+)\.([0-9a-f]{8})-(\d+)-(\d+)\.[0-9a-f]{32}\.tmp")
STALE_SECONDS = 600.0  # a writer touches its file all the time; one silent for so long was killed

_UNKNOWN = "0" * 8

being_written: set[str] = set()
"""The temporary files that this process is writing, by the last part of their names."""


@cache
def _machine() -> str:
    """What processes whose numbers can be compared share: a boot and a namespace of numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return sha256(f"{boot}{os.stat('/proc/self/ns/pid').st_ino}".encode()).hexdigest()[:8]
    except OSError:  # no such system: no process is ever known to have ended
        return _UNKNOWN


def _begun(pid: int) -> int | None:
    """When a process of this machine began, in its clock's ticks; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def temporary_name(name: str, nbytes: int = 0) -> str:
    """A name that no reader and no other writer uses, in the same folder as `name`.

    Args:
        name: of the file to come; its folder may be left out.
        nbytes: that it will have.
    """
    parent, slash, last = name.rpartition("/")
    began = None if _machine() == _UNKNOWN else _begun(os.getpid())
    writer = f"{_machine()}-{os.getpid()}-{began or 0}"
    return f"{parent}{slash}.{last}.{nbytes}.{writer}.{uuid.uuid4().hex}.tmp"


def reserved_bytes(temporary: str) -> int:
    """Bytes that a temporary file may grow to, 0 when its name does not say."""
    said = _WRITTEN.fullmatch(temporary.rpartition("/")[2])
    return int(said[1]) if said else 0


def abandoned(temporary: str, silent: float) -> bool:
    """Whether nobody writes this temporary file any more.

    Known at once of a process of this machine; of another machine's, or of a name that does not
    say, by time alone.

    Args:
        temporary: its name.
        silent: seconds since it was last written to.
    """
    last = temporary.rpartition("/")[2]
    said = _WRITTEN.fullmatch(last)
    if said is None or said[2] != _machine() or _machine() == _UNKNOWN:
        return silent > STALE_SECONDS
    pid, began = int(said[3]), int(said[4])
    if _begun(pid) != began:
        return True
    return pid == os.getpid() and last not in being_written
