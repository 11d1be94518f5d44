"""A copy of a remote file that is fetched as it is read."""

import os
import tempfile
from collections.abc import Callable
from io import FileIO

from typing_extensions import Buffer, override

SEGMENT = 2**20
"""Bytes that a file is fetched in: small layers come several at a time, large ones at once."""


class RangedCopy(FileIO):
    """A file of this machine, without a name, that is as long as a remote one.

    Reading fetches what has not been fetched yet of the segments that are read, neighbours in one
    call, and keeps it. One thread reads it at a time.

    Args:
        size: bytes of the remote file.
        fetch: gives the bytes from one place up to another. Where it gives the whole file instead,
            as a web server does that knows no ranges, all of it is kept.

    Raises:
        OSError: when there is no room for it.
    """

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        descriptor, path = tempfile.mkstemp(prefix="picache-")
        os.unlink(path)
        super().__init__(descriptor, "r+")
        try:
            self.truncate(size)
        except BaseException:
            self.close()
            raise
        self._size, self._fetch = size, fetch
        self._missing = set(range(-(-size // SEGMENT)))

    @classmethod
    def of(cls, data: bytes) -> "RangedCopy":
        """The copy of a file that has been fetched as a whole."""
        copy = cls(len(data), lambda begin, end: b"")
        copy.write(data)
        copy.seek(0)
        copy._missing.clear()
        return copy

    @override
    def readinto(self, buffer: Buffer, /) -> int | None:
        """Read as any file does; 0 bytes also where the remote file ends before its size.

        Raises:
            Exception: whatever fetching raises.
        """
        begin = self.tell()
        end = min(begin + memoryview(buffer).nbytes, self._size)
        if not self._fetched(begin, end):
            return 0
        self.seek(begin)
        return super().readinto(buffer)

    def _fetched(self, begin: int, end: int) -> bool:
        """Fetch what is missing of these bytes; whether all of them are there now."""
        for first, last in self._gaps(begin, end):
            start, stop = first * SEGMENT, min(last * SEGMENT, self._size)
            data = self._fetch(start, stop)
            if len(data) == self._size:
                start, first, last = 0, 0, -(-self._size // SEGMENT)
            elif len(data) != stop - start:
                return False
            self.seek(start)
            self._fill(data)
            self._missing.difference_update(range(first, last))
            if not self._missing:
                break
        return True

    def _gaps(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Runs of segments, first and one past the last, that are missing of these bytes."""
        runs: list[tuple[int, int]] = []
        for segment in range(begin // SEGMENT, -(-end // SEGMENT)):
            if segment not in self._missing:
                continue
            if runs and runs[-1][1] == segment:
                runs[-1] = runs[-1][0], segment + 1
            else:
                runs.append((segment, segment + 1))
        return runs

    def _fill(self, data: bytes) -> None:
        view = memoryview(data)
        while len(view):
            view = view[self.write(view) :]
