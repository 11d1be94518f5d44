"""The store of compiled chunks, with up to three tiers, each bounded in bytes."""

import math
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

from picache.chunk import KV, STORAGES, Header
from picache.errors import CorruptChunk, PICacheError, StoreFull, StoreUnavailable
from picache.store.chunk_name import file_name
from picache.store.disk import Disk
from picache.store.failures import Failures
from picache.store.folder_index import Totals
from picache.store.in_use import InUse
from picache.store.memory import Memory
from picache.store.quantize import Encoded, encode
from picache.store.remote_calls import RemoteLimits
from picache.store.stored import StoredChunk, check_kv, human
from picache.store.tiers import Entry
from picache.store.together import Packed, layer_groups, moved


@dataclass(frozen=True)
class TierStats:
    """What one tier of a store holds and has done.

    Attributes:
        name: "device", "host" or "disk".
        chunks: how many it holds.
        nbytes: bytes it holds.
        budget: its bound in bytes; `math.inf` for none.
        hits: how many chunks were served from it.
    """

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
    """What a store holds and has done: its tiers, and the counters of `ChunkStore`.

    Attributes:
        failures: what tiers failed at and how often, by kind, such as "disk read: TimeoutError".
            Each cost a miss or a write that was left out, and no more.
    """

    tiers: tuple[TierStats, ...]
    hits: int
    misses: int
    demotions: int
    evictions: int
    corrupt: int
    disk_failures: int
    failures: dict[str, int] = field(default_factory=dict)


class ChunkStore:
    """Keeps the KV of compiled chunks on the device, in host memory and on disk.

    A chunk is put on the device it was compiled on. Where the device tier has no room, chunks move
    to host memory; where that has none, they remain on disk; a chunk that is on no disk is then
    gone. With a `path`, every chunk is also written to disk when it is put, so that it outlives the
    process. Reading a chunk does not move it to a faster tier; `promote` does. One store may serve
    several models, since keys tell their chunks apart (`picache.chunk.chunk_key`). Several threads
    may use a store at the same time.

    A store may lose chunks, and does not fail who asks it for them: whatever a disk, a network or
    another process does, `get` and `in` find nothing then and `put` leaves the write out. Such
    failures are counted in `stats().failures`, and the first of each kind is warned about.

    Args:
        device_bytes: the most bytes of keys and values on the device; None for no bound.
        host_bytes: the most bytes in host memory, which is page-locked where chunks come from a
            CUDA device; `math.inf` for no bound, None for no host tier. Chunks get here only from a
            device tier that has a bound.
        path: local folder or fsspec URL to keep chunks under; None for no disk tier. Other stores
            and processes may use it at the same time. An HTTP URL is read only: the chunks of a
            store that is served there are found, and none is written.
        disk_bytes: the most bytes of this namespace's files there, temporary ones included; None
            for no bound. Older files are deleted before a new one is written. The index beside the
            files, some 300 bytes a chunk, does not count. In a local folder the bound holds for
            all processes and threads together, behind a URL for those of this process.
        eviction: which chunks leave a full tier: "lru" the least recently used, "cost" those that
            are quick to compile again for their bytes; see `picache.store.tiers.Tier`.
        storage: "exact"; or "int8" or "fp8", which take half the bytes of bf16 and are not exact
            (see `picache.store.quantize.encode`). The dtype given out is always the one put in.
        namespace: the tenant. Stores of different namespaces see nothing of each other.
        remote_timeout: seconds that a call to the file system behind a URL may take, and one more
            for every MiB it moves.
        remote_retries: how often such a call is made again when it fails, 0 to 10.
        remote_pause: seconds for which a URL is not asked after two calls in a row failed with all
            their retries.

    Attributes:
        hits: how many chunks were asked for and found.
        misses: how many were asked for and not found.
        demotions: how many left a tier and remain in a slower one.
        evictions: how many were lost altogether for want of room.
        corrupt: how many damaged or foreign files were found, and removed.
        disk_failures: how many chunks could not be written to disk.
        failures: what tiers failed at and how often, by kind; see `StoreStats`.

    Raises:
        PICacheError: when a bound is not positive, a name unknown, or `path` is not a chunk store,
            does not answer or cannot be written to.
    """

    def __init__(
        self,
        device_bytes: float | None = None,
        host_bytes: float | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        disk_bytes: float | None = None,
        eviction: Literal["lru", "cost"] = "lru",
        storage: Literal["exact", "int8", "fp8"] = "exact",
        namespace: str = "",
        remote_timeout: float = 30.0,
        remote_retries: int = 2,
        remote_pause: float = 30.0,
    ) -> None:
        if storage not in STORAGES:
            raise PICacheError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
        if not isinstance(namespace, str):
            raise PICacheError(f"namespace must be a text, got {namespace!r}")
        if disk_bytes is not None and path is None:
            raise PICacheError(f"disk_bytes={disk_bytes} needs a path to write to: give path=...")
        self.storage, self.namespace = storage, namespace
        limits = RemoteLimits(remote_timeout, remote_retries, remote_pause)
        self._lock = threading.RLock()
        self._in_use, self._failures = InUse(), Failures()
        self._memory = Memory(device_bytes, host_bytes, eviction, self._in_use, self._failures)
        self._disk = (
            None
            if path is None
            else Disk(path, disk_bytes, eviction, namespace, storage, self._in_use, limits)
        )
        self._hits: Counter[str] = Counter()
        self.misses = self.evictions = self._left_to_disk = 0
        self._seen = Totals(0, 0)  # on disk, when it last said
        if self._disk is not None:
            with self._failures.absorbed("disk", "index", f"{self._disk.where} is not bounded yet"):
                self._count_deleted(self._disk.look())

    # What is held

    @property
    def nbytes(self) -> int:
        """Bytes held in memory, on the device and in the host tier."""
        return sum(tier.nbytes for tier in self._memory.tiers)

    @property
    def hits(self) -> int:
        """How many chunks were asked for and found, in any tier."""
        return self._hits.total()

    @property
    def demotions(self) -> int:
        """How many chunks left a tier and remain in a slower one."""
        return self._memory.demotions + self._left_to_disk

    @property
    def corrupt(self) -> int:
        """How many damaged or foreign files were found, and removed."""
        return 0 if self._disk is None else self._disk.corrupt

    @property
    def disk_failures(self) -> int:
        """How many chunks could not be written to disk."""
        kinds = self.failures.items()
        return sum(count for kind, count in kinds if kind.startswith("disk write:"))

    @property
    def failures(self) -> Counter[str]:
        """What tiers failed at, and how often, by kind; see `StoreStats`."""
        return self._failures.counts()

    def _on_disk(self) -> Totals:
        """Chunks and bytes on disk, as it says now or said last."""
        if self._disk is not None:
            with self._failures.absorbed("disk", "index", f"{self._disk.where} is not looked at"):
                self._seen = self._disk.totals()
        return self._seen

    def stats(self) -> StoreStats:
        """The counters and what each tier holds, all at the same moment."""
        on_disk = self._on_disk()
        with self._lock:
            tiers = [
                TierStats(
                    tier.name, len(tier.entries), tier.nbytes, tier.budget, self._hits[tier.name]
                )
                for tier in self._memory.tiers
            ]
            if self._disk is not None:
                budget = self._disk.budget
                tiers.append(TierStats("disk", *on_disk, budget, self._hits["disk"]))
            return StoreStats(
                tuple(tiers),
                self.hits,
                self.misses,
                self.demotions,
                self.evictions,
                self.corrupt,
                self.disk_failures,
                dict(self.failures),
            )

    def __contains__(self, key: str) -> bool:
        with self._lock:
            if key in self._memory:
                return True
        disk = self._disk
        if disk is not None:
            file_name(key)  # refuse a key that cannot name a file
            with self._failures.absorbed("disk", "look-up", f"chunk {key} counts as absent"):
                return key in disk
        return False

    def on_device(self, keys: Iterable[str]) -> bool:
        """Whether all of these chunks are in the device's tier."""
        with self._lock:
            return all(key in self._memory.tiers[0].entries for key in keys)

    def __len__(self) -> int:
        with self._lock:
            in_memory = [key for tier in self._memory.tiers for key in tier.entries]
        if self._disk is None:
            return len(in_memory)
        alone = len(in_memory)
        with self._failures.absorbed("disk", "index", f"{self._disk.where} is not looked at"):
            alone = self._disk.missing(in_memory)
        return alone + self._on_disk().chunks

    def __repr__(self) -> str:
        stats = self.stats()
        tiers = "; ".join(str(tier) for tier in stats.tiers)
        where = "" if self._disk is None else f" at {self._disk.where}"
        return (
            f"ChunkStore({len(self)} chunks, {self.storage}: {tiers}{where}; {stats.hits} hits, "
            f"{stats.misses} misses, {stats.demotions} demotions, {stats.evictions} evictions, "
            f"{stats.corrupt} corrupt, {stats.disk_failures} disk failures)"
        )

    # Reading

    def get(self, key: str) -> StoredChunk | None:
        """The chunk under `key`, which counts as used now; None when it is absent or damaged."""
        found = self._find(key)
        with self._lock:
            if found is None:
                self.misses += 1
            else:
                self._hits[found.tier] += 1
        return found

    def _find(self, key: str) -> StoredChunk | None:
        """The chunk under `key` in the fastest tier that has it, without counting a hit."""
        with self._lock:
            held = self._memory.find(key)
            if held is not None:
                tier, entry = held
                assert entry.header is not None
                layers = entry.layers  # a demotion later on replaces the list, and this one stays
                if entry.given_out is None or entry.given_out.tier != tier.name:
                    sizes = (entry.nbytes, tier.name, len(layers))
                    entry.given_out = StoredChunk(key, entry.header, *sizes, layers)
                return entry.given_out
        disk = self._disk
        if disk is None:
            return None
        file_name(key)  # refuse a key that cannot name a file
        with self._failures.absorbed("disk", "read", f"chunk {key} counts as absent"):
            found = disk.open(key)
            if found is None:
                return None
            file, reading, dropped = found.file, found, threading.Lock()

            def read(layers: range) -> Packed:
                try:
                    return reading.layers(layers)
                except CorruptChunk:
                    if dropped.acquire(blocking=False):  # once: several threads read its layers
                        with self._failures.absorbed("disk", "remove", f"chunk {key} is damaged"):
                            disk.damaged(key, file.version)
                    raise
                except Exception as error:  # the disk, not the file: nothing is deleted
                    self._failures.count("disk", "read", f"chunk {key} is compiled again", error)
                    raise CorruptChunk(f"chunk {key} cannot be read: {error}") from error

            return StoredChunk(key, file.header, file.nbytes, "disk", len(file), read=read)
        return None

    # Writing

    def put(self, key: str, kv: list[KV], header: Header | None = None) -> None:
        """Store a chunk; others leave their tier until it fits.

        Where the disk cannot take it, that is counted, and warned about the first time; the chunk
        is then in memory alone.

        Args:
            key: made by `picache.chunk.chunk_key`.
            kv: keys and values layer by layer, each ``[1, kv_heads, tokens, head_dim]``. They are
                kept without a copy: do not write to them afterwards.
            header: what the KV depends on; its `compile_seconds` counts in eviction by cost.

        Raises:
            StoreFull: when there is no room; the store is unchanged. `StoreUnavailable` when there
                is none in memory and the disk failed.
            PICacheError: when a tensor is not finite, or when shapes, dtypes and header do not go
                together; the store is unchanged.
        """
        header = check_kv(key, kv, header, self.namespace, self.storage)
        if self._disk is not None:
            file_name(key)  # refuse a key that cannot name a file before anything moves
        entry = _entry(header, [encode(layer, self.storage) for layer in kv])
        written, error = self._write(key, header, entry.layers)
        with self._lock:
            if written and key in self._in_use.pins and key not in self._memory:
                return  # pinned on disk, where it stays
            level = self._memory.level_for(key, entry.nbytes)
            if level is not None:
                self._count_out(self._memory.insert(level, key, entry))
            elif not written:
                full = self._memory.no_room(entry.nbytes)
                if error is None or isinstance(error, StoreFull):
                    raise full
                raise StoreUnavailable(f"{full}; and the disk failed: {error}") from error

    def _write(
        self, key: str, header: Header, layers: list[Encoded]
    ) -> tuple[bool, Exception | None]:
        """Whether the chunk is on disk now, and what went wrong; without the lock."""
        disk = self._disk
        if disk is None or disk.read_only:
            return False, None
        gone: list[str] = []
        so = f"chunk {key} is not on disk at {disk.where}, only in memory"
        with self._failures.absorbed("disk", "write", so) as absorbed:
            disk.write(key, header, layers, gone)
        self._count_deleted(gone)
        return absorbed.error is None, absorbed.error

    def promote(self, key: str, device: torch.device | str) -> bool:
        """Move a chunk out of host memory, or copy it from disk, to the device tier.

        Args:
            key: of the chunk.
            device: the device to bring it to.

        Returns:
            Whether it is in the device tier now; False when it is absent, when it is pinned in
            another tier, or when there is no room.

        Raises:
            CorruptChunk: when its file is damaged; the store has dropped it.
        """
        found = self._find(key)
        if found is None or found.tier == "device":
            return found is not None
        if key in self._in_use.pins:
            return False
        with self._lock:  # before anything is copied; the size of a file in memory is not known yet
            room = self._memory.tiers[0].room_for(found.nbytes, key, self._in_use)
        if room is None and found.tier == "host":
            return False
        layers: list[Encoded] = []
        for group in layer_groups(found.num_layers, found.nbytes):
            parts = found.encoded(group)
            so = f"chunk {key} stays where it is"
            with self._failures.absorbed("device", "write", so) as absorbed:
                layers += moved(parts, device)
            if absorbed.error is not None:
                return False
        entry = _entry(found.header, layers)
        with self._lock:
            room = self._memory.tiers[0].room_for(entry.nbytes, key, self._in_use)
            if room is None or key in self._in_use.pins:  # pinned meanwhile
                return False
            self._count_out(self._memory.insert(0, key, entry))
        return True

    def _count_out(self, gone: list[str]) -> None:
        """Count chunks that left memory: as demotions if they are on disk, else as evictions."""
        for key in gone:
            on_disk = self._disk is not None and self._disk.holds(key)
            self._left_to_disk += on_disk
            self.evictions += not on_disk

    def _count_deleted(self, gone: list[str]) -> None:
        """Count, as evictions, files deleted for want of room whose chunk is not in memory."""
        with self._lock:
            self.evictions += sum(key not in self._memory for key in gone)

    # What must stay

    def pin(self, key: str) -> None:
        """Keep a chunk in its tier until `unpin`; pinning it twice is the same as once.

        Raises:
            PICacheError: when it is not in the store, or the disk cannot say whether it is.
        """
        with self._lock:
            held = key in self._memory
        if not held and self._disk is not None:
            file_name(key)
            try:
                held = key in self._disk
            except Exception as error:
                raise PICacheError(
                    f"cannot pin {key!r}: it is not in memory, and {self._disk.where} does not "
                    f"say whether it is there: {type(error).__name__}: {error}"
                ) from error
        if not held:
            raise PICacheError(f"cannot pin {key!r}: it is not in the store; put it first")
        self._in_use.pin(key)

    def unpin(self, key: str) -> None:
        """Allow a pinned chunk to leave its tier again.

        Raises:
            PICacheError: when it is not pinned.
        """
        self._in_use.unpin(key)

    @contextmanager
    def using(self, keys: Iterable[str]) -> Iterator[None]:
        """A context manager: inside its block none of these chunks is evicted or demoted.

        A key that is not in the store yet counts from when its chunk is put. `PIC.link` uses the
        chunks of the prompt it is linking. A bound that could not be kept meanwhile is kept again
        at the end.
        """
        with self._in_use.using(keys):
            yield
        if self._disk is not None:
            with self._failures.absorbed("disk", "remove", f"{self._disk.where} is over its bound"):
                self._count_deleted(self._disk.trim())

    def clear(self) -> None:
        """Remove every chunk, pinned ones and files on disk included; the counters stay.

        Raises:
            PICacheError: when chunks are in use, or the disk does not let its files be deleted;
                the store is unchanged. Where it lets some be deleted, those are gone.
        """
        self._refuse_in_use()
        if self._disk is not None:  # without the lock: it may take long
            if self._disk.read_only:
                raise PICacheError(f"cannot clear {self._disk.where}: it is read only")
            try:
                self._disk.clear()
            except Exception as error:
                raise PICacheError(
                    f"cannot clear {self._disk.where}: {type(error).__name__}: {error}; what could "
                    "not be deleted there, and what is in memory, is still in the store"
                ) from error
        with self._lock:
            self._in_use.pins.clear()
            self._memory.clear()

    def _refuse_in_use(self) -> None:
        if self._in_use.num_referenced:
            raise PICacheError(
                f"cannot clear a store while {self._in_use.num_referenced} chunks are in use: "
                "leave the block of `using` first"
            )


def _entry(header: Header, layers: list[Encoded]) -> Entry:
    """An entry of a tier in memory."""
    entry = Entry.of(sum(part.nbytes for layer in layers for part in layer.values()), header)
    entry.layers = layers
    return entry
