"""The disk tier: a directory of chunk files, bounded in bytes."""

import math
import os
import re
import warnings
from contextlib import suppress
from threading import RLock
from urllib.parse import quote

from picache.chunk import Header
from picache.errors import CorruptChunk, PICacheError
from picache.store.chunkfile import ChunkFile, pack
from picache.store.files import SUFFIX
from picache.store.in_use import InUse
from picache.store.quantize import Encoded
from picache.store.remote import open_files
from picache.store.tiers import Entry, Tier


class Disk:
    """The chunk files of one namespace and storage under a path or URL.

    The directory is the index: there is no index file that a crash could tear or two writers could
    fight over. `tier` mirrors it as last seen, for the bound and for which file to lose first. Two
    processes that write one key both write the same chunk; the last one stays.

    Args:
        path: a local folder or an fsspec URL.
        disk_bytes: most bytes of files; None for no bound.
        eviction: see `Tier`.
        namespace: the tenant; each has a folder of its own.
        storage: how tensors are kept; each kind has a folder of its own.
        in_use: says what must not be deleted.
        lock: of the store; held for `tier`, not while files are written or read.

    Attributes:
        corrupt: files that failed a check, and were removed.
        failures: chunks that could not be written.

    Raises:
        PICacheError: when `path` cannot hold a store; see `open_files`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        disk_bytes: float | None,
        eviction: str,
        namespace: str,
        storage: str,
        in_use: InUse,
        lock: RLock,
    ) -> None:
        folder = "ns=" + quote(namespace, safe="")
        if len(folder) > 200:
            raise PICacheError(
                f"namespace is {len(folder) - 3} characters long when quoted for a file name: "
                "give one of at most 197"
            )
        self.tier = Tier("disk", math.inf if disk_bytes is None else disk_bytes, eviction)
        self._namespace, self._storage = namespace, storage
        self._in_use, self._lock = in_use, lock
        self._files = open_files(path, f"{storage}/{folder}")
        self.where = self._files.where
        self.corrupt = self.failures = 0
        self._warned = False
        self.refresh()

    @staticmethod
    def name(key: str) -> str:
        """The file of a key; PICacheError when the key cannot name one."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", key):
            raise PICacheError(
                f"key {key!r} cannot name a file: give 1 to 128 letters, digits, '_' or '-', such "
                "as picache.header.chunk_key returns"
            )
        return f"{key[:2]}/{key}{SUFFIX}"

    def __contains__(self, key: str) -> bool:
        return self._files.exists(self.name(key))

    def refresh(self) -> list[str]:
        """Look at the directory again; the keys deleted because they were over the bound."""
        listed = sorted(self._files.listing().items(), key=lambda item: item[1].used)
        files = {name.rpartition("/")[2].removesuffix(SUFFIX): info for name, info in listed}
        with self._lock:
            for key in self.tier.entries.keys() - files.keys():
                self.tier.drop(key)
            for key, info in files.items():
                if key not in self.tier.entries:
                    self.tier.add(key, Entry.of(max(info.nbytes, 1)))
            return self._trim()

    def _trim(self, keep: str = "") -> list[str]:
        """Delete the files that are the cheapest to lose until the rest fits."""
        leave = self.tier.room_for(0, "", lambda key: key == keep or self._in_use(key)) or []
        for key in leave:
            self._files.remove(self.name(key))
            self.tier.drop(key, evicted=True)
        return leave

    def write(self, key: str, header: Header, layers: list[Encoded]) -> tuple[bool, list[str]]:
        """Write a chunk: whether it is on disk now, and the keys deleted to make room.

        What the disk cannot take is counted in `failures`, and warned about the first time.
        """
        data = pack(key, header, layers)
        nbytes = sum(piece.nbytes for piece in data)
        gone: list[str] = []
        try:
            if not math.isinf(self.tier.budget):
                gone += self.refresh()  # other processes fill the same directory
            with self._lock:
                fits = self.tier.room_for(nbytes, key, self._in_use) is not None
            if fits:
                self._files.write(self.name(key), data)
                with self._lock:
                    self.tier.add(key, Entry.of(nbytes, header))
                    gone += self._trim(key)
                return True, gone
            problem = f"its {nbytes:,} bytes do not fit disk_bytes={self.tier.budget:,}"
        except OSError as error:
            problem = f"{type(error).__name__}: {error}"
        with self._lock:
            self.failures += 1
            warn, self._warned = not self._warned, True
        if warn:
            warnings.warn(
                f"chunk {key} is not on disk at {self.where}, only in memory: {problem}. Further "
                "failures are counted in ChunkStore.disk_failures and not warned about",
                RuntimeWarning,
                stacklevel=3,  # where ChunkStore.put was called
            )
        return False, gone

    def open(self, key: str) -> tuple[ChunkFile | None, list[str]]:
        """The chunk's file, None when absent or damaged, and the keys deleted to make room."""
        name = self.name(key)
        try:
            with self._files.local(name) as (path, version):
                try:
                    file = ChunkFile(path, key, self._namespace, self._storage, version)
                except CorruptChunk:
                    self.damaged(key, version)
                    return None, []
        except FileNotFoundError:  # never written, or evicted by another process
            with self._lock:
                self.tier.drop(key)
            return None, []
        self._files.touch(name)
        with self._lock:
            if self.tier.room_for(file.nbytes, key, self._in_use) is None:
                return file, []  # another process's, too large for this one's bound
            self.tier.add(key, Entry.of(file.nbytes, file.header))
            return file, self._trim(key)

    def damaged(self, key: str, version: object) -> None:
        """Forget a file that failed its check, and delete it; not one written in its place."""
        gone = True
        with suppress(OSError):  # one that cannot be deleted is checked, and refused, every time
            gone = self._files.remove_version(self.name(key), version)
        with self._lock:
            self.corrupt += 1
            if gone:
                self.tier.drop(key)

    def clear(self) -> None:
        """Delete every file of this namespace and storage."""
        self.refresh()
        with self._lock:
            for key in list(self.tier.entries):
                self._files.remove(self.name(key))
                self.tier.drop(key)
