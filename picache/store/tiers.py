"""One tier of a store: entries up to a bound in bytes, and which of them to evict first."""

import heapq
import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from picache.arguments import real_number
from picache.chunk import Header
from picache.errors import PICacheError
from picache.store.in_use import InUse
from picache.store.quantize import Encoded

if TYPE_CHECKING:
    from picache.store.stored import StoredChunk

SECONDS_PER_BYTE = 30e-6 / 2**17
"""Compile time assumed for a chunk whose header does not say, in seconds per byte of KV: that of an
8-billion-parameter Llama 3.1 in bf16 on one H200, 30 microseconds and 128 KiB a token."""

EVICTIONS = ("lru", "cost")


def bound_of(name: str, budget: float, eviction: str) -> float:
    """A bound in whole bytes, or `math.inf`; PICacheError for another, or an unknown eviction."""
    needs, remedy = (
        f"{name}_bytes must be positive",
        "give a number of bytes such as 4e9, or leave it out for the default",
    )
    number = real_number(needs, budget, lambda nbytes: nbytes >= 1, remedy)
    if eviction not in EVICTIONS:
        raise PICacheError(f"eviction must be one of {', '.join(EVICTIONS)}, got {eviction!r}")
    return number if math.isinf(number) else int(number)


def seconds_of(nbytes: int, header: Header | None) -> float:
    """What compiling a chunk again takes: what its header says, else what its bytes suggest."""
    said = None if header is None else header.compile_seconds
    return nbytes * SECONDS_PER_BYTE if said is None else said


@dataclass
class Entry:
    """A chunk in a tier.

    Attributes:
        nbytes: bytes it takes in this tier.
        seconds: what it costs to compile it again.
        header: of the chunk; None for a file that was not opened yet.
        layers: its encoded layers; empty for a file.
        priority: set by the tier; the entry with the smallest is evicted first.
        given_out: the chunk of these layers as the store gave it out last.
    """

    nbytes: int
    seconds: float
    header: Header | None = None
    layers: list[Encoded] = field(default_factory=list)
    priority: tuple[float, int] = (0.0, 0)
    given_out: "StoredChunk | None" = None

    @classmethod
    def of(cls, nbytes: int, header: Header | None = None) -> "Entry":
        """An entry that costs what its header says, or else an estimate from its bytes."""
        return cls(nbytes, seconds_of(nbytes, header), header)


class Tier:
    """Entries by key, of no more bytes in all than the budget.

    "lru" evicts the least recently used entry. "cost" is GreedyDual-Size (Cao & Irani, "Cost-Aware
    WWW Proxy Caching Algorithms", USITS 1997). The priority of an entry is a floor plus its seconds
    to compile again per byte, set when it is used; the entry of the lowest priority is evicted, and
    the floor rises to that priority. An entry that is not used falls behind in this way. Where all
    entries cost the same per byte, it is LRU.

    Using, adding or evicting an entry takes time in proportion to the logarithm of the entries
    held, and to the entries that must stay: priorities are kept in a heap, in which an outdated one
    remains until it comes up.

    Args:
        name: "device", "host" or "disk".
        budget: the most bytes; `math.inf` for no bound.
        eviction: "lru" or "cost".

    Attributes:
        entries: by key.
        nbytes: of all entries.
    """

    def __init__(self, name: str, budget: float, eviction: str) -> None:
        self.name, self.budget = name, bound_of(name, budget, eviction)
        self.eviction = eviction
        self.entries: dict[str, Entry] = {}
        self.nbytes = 0
        self._floor = 0.0
        self._clock = itertools.count()
        self._order: list[tuple[tuple[float, int], str]] = []

    def touch(self, key: str) -> None:
        """Count the entry as used now, which sets its priority."""
        entry = self.entries[key]
        value = entry.seconds / entry.nbytes if self.eviction == "cost" else 0.0
        entry.priority = (self._floor + value, next(self._clock))
        heapq.heappush(self._order, (entry.priority, key))
        if len(self._order) > 2 * len(self.entries) + 64:  # mostly old ones: start afresh
            self._order = [(e.priority, k) for k, e in self.entries.items()]
            heapq.heapify(self._order)

    def room_for(self, nbytes: int, key: str, in_use: InUse) -> list[str] | None:
        """Which entries must leave to make room for a new one.

        Args:
            nbytes: of the new entry.
            key: of the new entry; one that it replaces counts as gone.
            in_use: tells of a key whether it must stay.

        Returns:
            Keys, the first to leave first; None when there is no way to make room.
        """
        held = self.entries[key].nbytes if key in self.entries else 0
        excess = self.nbytes - held + nbytes - self.budget
        if excess <= 0:
            return []
        staying = (self.entries[k].nbytes for k in in_use.held() if k in self.entries and k != key)
        if nbytes + sum(staying) > self.budget:
            return None
        return self.cheapest(excess, key, in_use)

    def cheapest(self, excess: float, key: str, in_use: InUse) -> list[str]:
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
            if victim != key and not in_use(victim):
                leave.append(victim)
                excess -= entry.nbytes
        for item in seen:
            heapq.heappush(self._order, item)
        return leave

    def add(self, key: str, entry: Entry) -> None:
        """Add an entry, or replace the one under its key; the caller has made room."""
        if key in self.entries:
            self.nbytes -= self.entries[key].nbytes
        self.entries[key] = entry
        self.nbytes += entry.nbytes
        self.touch(key)

    def drop(self, key: str, evicted: bool = False) -> None:
        """Remove an entry, if it is here; one that is evicted raises the floor."""
        if key in self.entries:
            if evicted:
                self.raise_floor(key)
            self.nbytes -= self.entries.pop(key).nbytes

    def raise_floor(self, key: str) -> None:
        """Raise the floor to the priority of an entry that is evicted."""
        self._floor = max(self._floor, self.entries[key].priority[0])
