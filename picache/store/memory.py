"""The two tiers in memory: the device, and host memory below it."""

import math

from picache.errors import StoreFull
from picache.store.failures import Failures
from picache.store.in_use import InUse
from picache.store.tiers import Entry, Tier
from picache.store.together import to_host


class Memory:
    """Chunks in memory, each in one tier; what the device has no room for moves to the host.

    Args:
        device_bytes: bound of the device tier in bytes; None for no bound.
        host_bytes: bound of the host tier in bytes; None for no host tier.
        eviction: see `Tier`.
        in_use: tells which chunks must stay where they are.
        failures: counts moves to host memory that failed; such a chunk is lost.

    Attributes:
        tiers: the device, and the host if there is one.
        demotions: how many chunks moved from the device to the host.
    """

    def __init__(
        self,
        device_bytes: float | None,
        host_bytes: float | None,
        eviction: str,
        in_use: InUse,
        failures: Failures,
    ) -> None:
        device = Tier("device", math.inf if device_bytes is None else device_bytes, eviction)
        self.tiers = [device]
        if host_bytes is not None:
            self.tiers.append(Tier("host", host_bytes, eviction))
        self.demotions = 0
        self._in_use, self._failures = in_use, failures

    def __contains__(self, key: str) -> bool:
        return any(key in tier.entries for tier in self.tiers)

    def find(self, key: str) -> tuple[Tier, Entry] | None:
        """The tier and the entry of a chunk, which counts as used now; None when it is absent."""
        for tier in self.tiers:
            if key in tier.entries:
                tier.touch(key)
                return tier, tier.entries[key]
        return None

    def level_for(self, key: str, nbytes: int) -> int | None:
        """Index of the fastest tier that can take a chunk of `nbytes`; None if none can.

        A pinned chunk stays in the tier it is in.
        """
        pinned = key in self._in_use.pins and key in self
        for level, tier in enumerate(self.tiers):
            here = not pinned or key in tier.entries
            if here and tier.room_for(nbytes, key, self._in_use) is not None:
                return level
        return None

    def insert(self, level: int, key: str, entry: Entry) -> list[str]:
        """Put an entry in a tier that has room for it, and remove it from the other.

        Returns:
            Keys of the chunks that left memory to make room.
        """
        tier = self.tiers[level]
        if level > 0:
            entry.layers = to_host(entry.layers)
            entry.given_out = None  # it holds what was on the device
        leave = tier.room_for(entry.nbytes, key, self._in_use)
        assert leave is not None, "level_for said there is room"
        for other in self.tiers:
            if other is not tier:
                other.drop(key)
        gone = [lost for victim in leave for lost in self._demote(level, victim)]
        tier.add(key, entry)
        return gone

    def _demote(self, level: int, key: str) -> list[str]:
        """Move an entry one tier down, or out of memory; the keys that left memory."""
        tier = self.tiers[level]
        entry = tier.entries[key]
        below = self.tiers[level + 1 : level + 2]
        if below and below[0].room_for(entry.nbytes, key, self._in_use) is not None:
            tier.raise_floor(key)
            with self._failures.absorbed(below[0].name, "write", f"chunk {key} left memory"):
                gone = self.insert(level + 1, key, entry)
                self.demotions += 1
                return gone
        tier.drop(key, evicted=True)
        return [key]

    def clear(self) -> None:
        """Remove every chunk."""
        for tier in self.tiers:
            for key in list(tier.entries):
                tier.drop(key)

    def no_room(self, nbytes: int) -> StoreFull:
        """The error for a chunk of `nbytes` that no tier can take."""
        largest = max(self.tiers, key=lambda tier: tier.budget)
        if nbytes > largest.budget:
            return StoreFull(
                f"a chunk of {nbytes:,} bytes does not fit a store of {largest.budget:,} bytes: "
                f"raise {largest.name}_bytes or split the document"
            )
        keys = [key for tier in self.tiers for key in tier.entries]
        return StoreFull(
            f"a chunk of {nbytes:,} bytes does not fit: {sum(map(self._in_use, keys))} of the "
            f"{len(keys)} chunks in memory are pinned or in use and cannot leave; unpin some or "
            f"raise {largest.name}_bytes={largest.budget:,}"
        )
