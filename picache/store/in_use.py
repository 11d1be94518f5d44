"""Which chunks must stay where they are: pinned ones, and ones in use just now."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock

from picache.errors import PICacheError


class Busy:
    """Pins and reference counts by key; calling it with a key says whether that must stay.

    Its lock is its own: nobody who holds it waits for another.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self.pins: set[str] = set()
        self._uses: Counter[str] = Counter()

    def __call__(self, key: str) -> bool:
        """Whether the chunk must stay."""
        return key in self.pins or self._uses[key] > 0

    def held(self) -> set[str]:
        """Every chunk that must stay."""
        with self._lock:
            return self.pins | self._uses.keys()

    @property
    def in_use(self) -> int:
        """Chunks with a reference."""
        return len(self._uses)

    def pin(self, key: str) -> None:
        """Keep a chunk where it is."""
        with self._lock:
            self.pins.add(key)

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
