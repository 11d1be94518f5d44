"""Which chunks must not be evicted: those that are pinned, and those that a link is reading."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import RLock

from picache.errors import PICacheError


class InUse:
    """The pins and the reference counts of chunks, by key.

    Calling it with a key tells whether that chunk must stay in the tier it is in.

    Args:
        lock: of the store.

    Attributes:
        pins: keys of the pinned chunks.
    """

    def __init__(self, lock: RLock) -> None:
        self._lock = lock
        self.pins: set[str] = set()
        self._uses: Counter[str] = Counter()

    def __call__(self, key: str) -> bool:
        """Whether the chunk is pinned or in use, and must stay in its tier."""
        return key in self.pins or self._uses[key] > 0

    @property
    def num_referenced(self) -> int:
        """How many chunks have a reference."""
        return len(self._uses)

    def unpin(self, key: str) -> None:
        """Allow a pinned chunk to be evicted again; PICacheError when it is not pinned."""
        with self._lock:
            if key not in self.pins:
                raise PICacheError(f"cannot unpin {key!r}: it is not pinned")
            self.pins.remove(key)

    @contextmanager
    def using(self, keys: Iterable[str]) -> Iterator[None]:
        """Hold a reference to each chunk inside the ``with`` block."""
        keys = list(keys)
        with self._lock:
            self._uses.update(keys)
        try:
            yield
        finally:
            with self._lock:
                self._uses.subtract(keys)
                self._uses = +self._uses  # without the zeros
