"""One tier of a store: entries bounded in bytes, and which of them to lose first."""

import heapq
import itertools
from dataclasses import dataclass, field

from picache.chunk import Header
from picache.errors import PICacheError
from picache.store.in_use import Busy
from picache.store.quantize import Encoded

SECONDS_PER_BYTE = 30e-6 / 2**17
"""Compile time of a chunk that does not say: an 8-billion-parameter Llama 3.1 in bf16 on one H200,
30 microseconds and 128 KiB a token."""

EVICTIONS = ("lru", "cost")


def check_bound(name: str, budget: float, eviction: str) -> None:
    """Refuse a bound that is not positive and an unknown rule of eviction."""
    if not budget > 0:
        raise PICacheError(
            f"{name}_bytes must be positive, got {budget}: leave it out for the default"
        )
    if eviction not in EVICTIONS:
        raise PICacheError(f"eviction must be one of {', '.join(EVICTIONS)}, got {eviction!r}")


def seconds_of(nbytes: int, header: Header | None) -> float:
    """What compiling a chunk again takes: what its header says, else what its bytes suggest."""
    said = None if header is None else header.compile_seconds
    return nbytes * SECONDS_PER_BYTE if said is None else said


@dataclass
class Entry:
    """A chunk in a tier.

    Attributes:
        nbytes: as held in this tier.
        seconds: to compile it again.
        header: of the chunk; None for a file not yet opened.
        layers: its tensors; none for a file.
        priority: the entry of the smallest is lost first; set by the tier.
    """

    nbytes: int
    seconds: float
    header: Header | None = None
    layers: list[Encoded] = field(default_factory=list)
    priority: tuple[float, int] = (0.0, 0)

    @classmethod
    def of(cls, nbytes: int, header: Header | None = None) -> "Entry":
        """An entry whose cost is what its header says, else what its bytes suggest."""
        return cls(nbytes, seconds_of(nbytes, header), header)


class Tier:
    """Entries by key, never more bytes than the budget.

    "lru" loses the least recently used. "cost" is GreedyDual-Size (Cao & Irani, "Cost-Aware WWW
    Proxy Caching Algorithms", USITS 1997): an entry's priority is its seconds to compile again per
    byte on top of a floor; the floor rises to the priority of what is lost, so that what is not
    used ages. With one cost per byte for all it is LRU.

    A use, an entry taken in and one lost cost the logarithm of the entries held, and the entries
    that must stay: priorities lie in a heap, where an old one stays until it comes up.

    Args:
        name: for reports.
        budget: bytes; `math.inf` for no bound.
        eviction: "lru" or "cost".
    """

    def __init__(self, name: str, budget: float, eviction: str) -> None:
        check_bound(name, budget, eviction)
        self.name, self.budget, self.eviction = name, budget, eviction
        self.entries: dict[str, Entry] = {}
        self.nbytes = 0
        self._floor = 0.0
        self._clock = itertools.count()
        self._order: list[tuple[tuple[float, int], str]] = []

    def touch(self, key: str) -> None:
        """The entry is the most recently used now."""
        entry = self.entries[key]
        value = entry.seconds / entry.nbytes if self.eviction == "cost" else 0.0
        entry.priority = (self._floor + value, next(self._clock))
        heapq.heappush(self._order, (entry.priority, key))
        if len(self._order) > 2 * len(self.entries) + 64:  # mostly old ones: start afresh
            self._order = [(e.priority, k) for k, e in self.entries.items()]
            heapq.heapify(self._order)

    def room_for(self, nbytes: int, key: str, busy: Busy) -> list[str] | None:
        """What must leave for `key` to take `nbytes`, first to leave first; None if no way.

        Args:
            nbytes: of the entry to come.
            key: its key; an entry it replaces counts as gone.
            busy: says of a key that it must stay.
        """
        held = self.entries[key].nbytes if key in self.entries else 0
        excess = self.nbytes - held + nbytes - self.budget
        if excess <= 0:
            return []
        staying = (self.entries[k].nbytes for k in busy.held() if k in self.entries and k != key)
        if nbytes + sum(staying) > self.budget:
            return None
        return self.cheapest(excess, key, busy)

    def cheapest(self, excess: float, key: str, busy: Busy) -> list[str]:
        """The cheapest to lose, `key` and what must stay left out, until `excess` bytes are found.

        All that may leave, where that is less.
        """
        leave: list[str] = []
        seen = []
        while self._order and excess > 0:
            priority, victim = heapq.heappop(self._order)
            entry = self.entries.get(victim)
            if entry is None or entry.priority != priority:
                continue
            seen.append((priority, victim))
            if victim != key and not busy(victim):
                leave.append(victim)
                excess -= entry.nbytes
        for item in seen:
            heapq.heappush(self._order, item)
        return leave

    def add(self, key: str, entry: Entry) -> None:
        """Take the entry in, in place of one under the same key; room was made before."""
        if key in self.entries:
            self.nbytes -= self.entries[key].nbytes
        self.entries[key] = entry
        self.nbytes += entry.nbytes
        self.touch(key)

    def drop(self, key: str, evicted: bool = False) -> None:
        """Take the entry out, if it is here. What was evicted raises the floor."""
        if key in self.entries:
            if evicted:
                self.raise_floor(key)
            self.nbytes -= self.entries.pop(key).nbytes

    def raise_floor(self, key: str) -> None:
        """The entry leaves for want of room: what is used from now on outranks it."""
        self._floor = max(self._floor, self.entries[key].priority[0])
