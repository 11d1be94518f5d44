"""Which chunks must stay where they are: pinned ones, and ones in use just now."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import RLock

from picache.errors import PICacheError


class InUse:
    """Pins and reference counts by key; calling it with a key says whether that must stay."""

    def __init__(self, lock: RLock) -> None:
        self._lock = lock
        self.pins: set[str] = set()
        self._uses: Counter[str] = Counter()

    def __call__(self, key: str) -> bool:
        """Whether the chunk must stay."""
        return key in self.pins or self._uses[key] > 0

    @property
    def num_referenced(self) -> int:
        """Chunks with a reference."""
        return len(self._uses)

    def unpin(self, key: str) -> None:
        """Let a pinned chunk leave again; PICacheError when it is not pinned."""
        with self._lock:
            if key not in self.pins:
                raise PICacheError(f"cannot unpin {key!r}: it is not pinned")
            self.pins.remove(key)

    @contextmanager
    def using(self, keys: Iterable[str]) -> Iterator[None]:
        """Hold a reference to each chunk while the block runs."""
        keys = list(keys)
        with self._lock:
            self._uses.update(keys)
        try:
            yield
        finally:
            with self._lock:
                self._uses.subtract(keys)
                self._uses = +self._uses  # without the zeros
