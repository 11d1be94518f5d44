"""The disk tier of a store: a folder of chunk files, bounded in bytes."""

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
    """The chunk files of one namespace and storage, under a path or URL.

    The folder itself is the index. There is no index file, which a crash could leave half written
    and two writers could overwrite for each other. `tier` mirrors the folder as it was last listed;
    it keeps the bound and decides which file to delete first. Two processes that write the same key
    write the same chunk, and the later file stays.

    Args:
        path: a local folder or an fsspec URL.
        disk_bytes: the most bytes of files; None for no bound.
        eviction: see `Tier`.
        namespace: the tenant; each has a folder of its own.
        storage: how tensors are kept; each kind has a folder of its own.
        in_use: tells which chunks must not be deleted.
        lock: of the store; held while `tier` is read or changed, not while files are written or
            read.

    Attributes:
        tier: the files as entries.
        where: the path or URL, as text.
        corrupt: how many files failed a check, and were removed.
        failures: how many chunks could not be written.

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
        """The file name of a key; PICacheError when the key cannot be one."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", key):
            raise PICacheError(
                f"key {key!r} cannot name a file: give 1 to 128 letters, digits, '_' or '-', such "
                "as picache.chunk.chunk_key returns"
            )
        return f"{key[:2]}/{key}{SUFFIX}"

    def __contains__(self, key: str) -> bool:
        return self._files.exists(self.name(key))

    def refresh(self) -> list[str]:
        """List the folder again, and delete files that are over the bound; returns their keys."""
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
        """Delete files until the others fit the bound, `keep` never; returns the deleted keys."""
        leave = self.tier.room_for(0, "", lambda key: key == keep or self._in_use(key)) or []
        for key in leave:
            self._files.remove(self.name(key))
            self.tier.drop(key, evicted=True)
        return leave

    def write(self, key: str, header: Header, layers: list[Encoded]) -> tuple[bool, list[str]]:
        """Write a chunk. One that cannot be written is counted, and warned about the first time.

        Args:
            key: of the chunk.
            header: of the chunk.
            layers: as encoded for storage.

        Returns:
            Whether the chunk is on disk now, and the keys deleted to make room.
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
        """Open the file of a chunk, which counts as used now.

        Returns:
            The file, None when it is absent or damaged; and the keys deleted to make room, since
            another process may have written it.
        """
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
                return file, []  # written by another process, and too large for this bound
            self.tier.add(key, Entry.of(file.nbytes, file.header))
            return file, self._trim(key)

    def damaged(self, key: str, version: object) -> None:
        """Delete a file that failed its check, but not another that was written in its place."""
        gone = True
        with suppress(OSError):  # a file that cannot be deleted is refused each time
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
