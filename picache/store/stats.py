"""What a store holds and has done, for people to read."""

import math
from dataclasses import dataclass

from picache.store.stored import human


@dataclass(frozen=True)
class TierStats:
    """One tier: chunks and bytes held, the bound in bytes (inf for none), hits served from it."""

    name: str
    chunks: int
    nbytes: int
    budget: float
    hits: int

    def __str__(self) -> str:
        bound = "no bound" if math.isinf(self.budget) else f"of {human(self.budget)}"
        return f"{self.name} {self.chunks} chunks, {human(self.nbytes)} ({bound}), {self.hits} hits"


@dataclass(frozen=True)
class StoreStats:
    """What a store holds and has done; see the attributes of `ChunkStore`."""

    tiers: tuple[TierStats, ...]
    hits: int
    misses: int
    demotions: int
    evictions: int
    corrupt: int
    disk_failures: int
