"""Which chunks must not be evicted: those that are pinned, and those that a link is reading."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock

from picache.errors import PICacheError


class InUse:
    """The pins and the reference counts of chunks, by key.

    Calling it with a key tells whether that chunk must stay in the tier it is in. It has a lock of
    its own: nobody who holds that waits for another.

    Attributes:
        pins: keys of the pinned chunks.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self.pins: set[str] = set()
        self._uses: Counter[str] = Counter()

    def __call__(self, key: str) -> bool:
        """Whether the chunk is pinned or in use, and must stay in its tier."""
        return key in self.pins or self._uses[key] > 0

    def held(self) -> set[str]:
        """Keys of all chunks that must stay."""
        with self._lock:
            return self.pins | self._uses.keys()

    @property
    def num_referenced(self) -> int:
        """How many chunks have a reference."""
        return len(self._uses)

    def pin(self, key: str) -> None:
        """Keep a chunk in its tier until `unpin`."""
        with self._lock:
            self.pins.add(key)

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
