"""One tier of a store: entries bounded in bytes, and which of them to lose first."""

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from picache.arguments import real_number
from picache.chunk import Header
from picache.errors import PICacheError
from picache.store.quantize import Encoded

SECONDS_PER_BYTE = 30e-6 / 2**17
"""Compile time of a chunk that does not say: an 8-billion-parameter Llama 3.1 in bf16 on one H200,
30 microseconds and 128 KiB a token."""

EVICTIONS = ("lru", "cost")


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
        seconds = None if header is None else header.compile_seconds
        return cls(nbytes, nbytes * SECONDS_PER_BYTE if seconds is None else seconds, header)


class Tier:
    """Entries by key, never more bytes than the budget.

    "lru" loses the least recently used. "cost" is GreedyDual-Size (Cao & Irani, "Cost-Aware WWW
    Proxy Caching Algorithms", USITS 1997): an entry's priority is its seconds to compile again per
    byte on top of a floor; the floor rises to the priority of what is lost, so that what is not
    used ages. With one cost per byte for all it is LRU.

    Args:
        name: for reports.
        budget: bytes; `math.inf` for no bound.
        eviction: "lru" or "cost".
    """

    def __init__(self, name: str, budget: float, eviction: str) -> None:
        needs, remedy = (
            f"{name}_bytes must be positive",
            "give a number of bytes such as 4e9, or leave it out for the default",
        )
        number = real_number(needs, budget, lambda nbytes: nbytes >= 1, remedy)
        self.budget = number if math.isinf(number) else int(number)
        if eviction not in EVICTIONS:
            raise PICacheError(f"eviction must be one of {', '.join(EVICTIONS)}, got {eviction!r}")
        self.name, self.eviction = name, eviction
        self.entries: dict[str, Entry] = {}
        self.nbytes = self.hits = 0
        self._floor = 0.0
        self._clock = itertools.count()

    def touch(self, key: str) -> None:
        """The entry is the most recently used now."""
        entry = self.entries[key]
        value = entry.seconds / entry.nbytes if self.eviction == "cost" else 0.0
        entry.priority = (self._floor + value, next(self._clock))

    def room_for(self, nbytes: int, key: str, busy: Callable[[str], bool]) -> list[str] | None:
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
        heap = [(e.priority, k) for k, e in self.entries.items() if k != key and not busy(k)]
        heapq.heapify(heap)
        leave = []
        while heap and excess > 0:
            _, victim = heapq.heappop(heap)
            leave.append(victim)
            excess -= self.entries[victim].nbytes
        return leave if excess <= 0 else None

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
