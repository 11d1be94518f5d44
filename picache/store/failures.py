"""The one place where a tier's failure becomes a miss or a write left out.

A cache may lose, but it may not fail the request: whatever a disk, a network or an allocator
raises while a chunk is looked up, read, written or removed is counted here by tier and kind,
warned about the first time, and gone.
"""

import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

beside: ContextVar[bool] = ContextVar("picache_beside", default=False)
"""Whether this thread works for another one, which asks for the counts when it is done."""

_PACKAGE = str(Path(__file__).parents[1]) + os.sep


@dataclass
class Absorbed:
    """The error that a block was left at, if any."""

    error: Exception | None = None


class Failures:
    """Counts what went wrong, and warns once of each tier and kind. Threads may share it.

    A kind is what was being done and the error's type: "disk read: TimeoutError". A warning names
    the line that called picache. A thread that works beside another (`beside`) knows of none: what
    it has to say is kept, and said to who asks for the counts next.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._unsaid: list[str] = []

    def counts(self) -> Counter[str]:
        """How often each kind was seen, at this moment."""
        with self._lock:
            unsaid, self._unsaid = self._unsaid, []
            counts = Counter(self._counts)
        for text in unsaid:
            warnings.warn(text, RuntimeWarning, stacklevel=_caller())
        return counts

    @contextmanager
    def absorbed(self, tier: str, doing: str, so: str) -> Iterator[Absorbed]:
        """Leave the block at any error, counted; what it gives knows the error afterwards.

        Args:
            tier: "device", "host" or "disk".
            doing: "read", "write", "remove", ...
            so: what it means for the caller; the warning begins with it.
        """
        absorbed = Absorbed()
        try:
            yield absorbed
        except Exception as error:  # a client library may raise anything
            absorbed.error = error
            self.count(tier, doing, so, error)

    def count(self, tier: str, doing: str, so: str, error: Exception) -> None:
        """Count an error, and warn of it if it is the first of its kind."""
        kind = f"{tier} {doing}: {type(error).__name__}"
        text = (
            f"{so}: {type(error).__name__}: {error}. Further failures of this kind are counted in "
            "ChunkStore.stats().failures and not warned about"
        )
        with self._lock:
            first = kind not in self._counts
            self._counts[kind] += 1
            if first and beside.get():
                self._unsaid.append(text)
        if first and not beside.get():
            warnings.warn(text, RuntimeWarning, stacklevel=_caller())


def _caller() -> int:
    """The level, for `warnings.warn` in the function that asks, of the code that called picache.

    That is whoever called its outermost function: between that and here may be a model's.
    """
    level, found, frame = 1, 2, sys._getframe(1)  # noqa: SLF001 - the documented way to a frame
    while frame.f_back is not None:
        level, frame = level + 1, frame.f_back
        if frame.f_code.co_filename.startswith(_PACKAGE):
            found = level + 1
    return found
