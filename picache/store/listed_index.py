"""What is behind a URL as this process last saw it, so that a bound can be kept there.

Object stores have no index that processes could share: what others write counts from the next
listing on, which is made when room is needed and the last one is `REFRESH_SECONDS` old.
"""

import math
import threading
import time

from picache.chunk import Header
from picache.errors import StoreFull
from picache.store.chunk_name import file_name, key_of
from picache.store.folder_index import Totals
from picache.store.in_use import InUse
from picache.store.remote import RemoteFiles
from picache.store.tiers import Entry, Tier
from picache.store.writers import abandoned, being_written, reserved_bytes

REFRESH_SECONDS = 10.0


class ListedIndex:
    """The bound of a remote folder, for the threads of one process.

    Args:
        files: behind the URL.
        budget: most bytes of files and temporary files; `math.inf` for no bound.
        eviction: "lru" or "cost"; see `Tier`.
        in_use: says what must not be deleted.

    Raises:
        Exception: by any method, whatever the file system raises; what the method was asked for is
            then left out.
    """

    def __init__(self, files: RemoteFiles, budget: float, eviction: str, in_use: InUse) -> None:
        self._files, self._in_use = files, in_use
        self._lock = threading.Lock()  # of the fields below; never held while the network is used
        self._tier = Tier("disk", budget, eviction)
        self.budget = self._tier.budget
        self._writing: dict[str, int] = {}  # bytes of temporary files by name
        self._first_seen: dict[str, float] = {}
        self._listed = -math.inf

    def open(self) -> list[str]:
        """Nothing is listed before it is needed."""
        return []

    def totals(self) -> Totals:
        """Chunks and bytes there, as of the last listing."""
        self._refresh()
        with self._lock:
            return Totals(len(self._tier.entries), self._held())

    def holds(self, key: str) -> bool:
        """Whether the file was there when this process last looked."""
        with self._lock:
            return key in self._tier.entries

    def missing(self, keys: list[str]) -> int:
        """How many of these are not there."""
        with self._lock:
            return sum(key not in self._tier.entries for key in keys)

    def trim(self) -> list[str]:
        """Delete what is the cheapest to lose until the rest fits; the keys deleted."""
        gone: list[str] = []
        if not math.isinf(self.budget):
            self._make_room(0, "", gone)
        return gone

    def reserve(self, key: str, nbytes: int, temporary: str, gone: list[str]) -> None:
        """Take room for a file before it is written; see `FolderIndex.reserve`."""
        if not math.isinf(self.budget):
            self._refresh()
            self._make_room(nbytes, key, gone)
        with self._lock:
            self._writing[temporary] = nbytes

    def publish(self, key: str, nbytes: int, header: Header, temporary: str) -> None:
        """Give a written file its name, and the reserved room to it."""
        self._files.publish(temporary, file_name(key))
        with self._lock:
            self._writing.pop(temporary, None)
            self._tier.add(key, Entry.of(nbytes, header))

    def release(self, key: str, temporary: str) -> None:
        """Delete a file that was not written to its end, and give its room back."""
        if temporary.endswith(".tmp"):  # not an object that is put under its own name
            self._files.remove(temporary)
        with self._lock:
            self._writing.pop(temporary, None)

    def missed(self, key: str) -> None:
        """A file was looked for in vain."""
        self.forget(key)

    def forget(self, key: str) -> None:
        """A file was deleted."""
        with self._lock:
            self._tier.drop(key)

    def clear(self) -> None:
        """Delete every file, and what ended writers left."""
        self._refresh(at_once=True)
        with self._lock:
            keys, temporaries = list(self._tier.entries), list(self._writing)
        for key in keys:
            self._files.remove(file_name(key))
            self.forget(key)
        self._sweep(temporaries)

    def _held(self) -> int:
        return self._tier.nbytes + sum(self._writing.values())

    def _refresh(self, at_once: bool = False) -> None:
        """Look at what is there again."""
        now = time.monotonic()
        with self._lock:
            if not at_once and now - self._listed < REFRESH_SECONDS:
                return
        listed = self._files.listing()
        with self._lock:
            self._listed = now
            keys = {key: size for name, size in listed.items() if (key := key_of(name)) is not None}
            for key in self._tier.entries.keys() - keys.keys():
                self._tier.drop(key)
            for key, size in keys.items():
                if key not in self._tier.entries:
                    self._tier.add(key, Entry.of(max(size, 1)))
            mine = {n: size for n, size in self._writing.items() if _last(n) in being_written}
            others = {n: size for n, size in listed.items() if n.endswith(".tmp")}
            sizes = {n: max(size, reserved_bytes(n)) for n, size in others.items()}
            self._writing = sizes | mine
            self._first_seen = {n: self._first_seen.get(n, now) for n in others}

    def _sweep(self, temporaries: list[str]) -> None:
        """Delete those whose writers have ended."""
        now = time.monotonic()
        for name in temporaries:
            if abandoned(name, now - self._first_seen.get(name, now)):
                self.release("", name)

    def _make_room(self, nbytes: int, key: str, gone: list[str]) -> None:
        with self._lock:
            temporaries = list(self._writing) if self._held() + nbytes > self.budget else []
        self._sweep(temporaries)
        with self._lock:
            writing = sum(self._writing.values())
            excess = self._held() + nbytes - self.budget
            room = self._tier.room_for(nbytes + writing, key, self._in_use)
            if nbytes and room is None:
                raise StoreFull(
                    f"its {nbytes:,} bytes do not fit disk_bytes={self.budget:,}, of which "
                    f"{writing:,} are of files being written"
                )
            leave = self._tier.cheapest(excess, key, self._in_use)
            for victim in leave:
                self._tier.drop(victim, evicted=True)
        for victim in leave:
            self._files.remove(file_name(victim))
            gone.append(victim)


def _last(name: str) -> str:
    return name.rpartition("/")[2]
