"""The disk tier of a store: a folder of chunk files, bounded in bytes."""

import math
import os
from pathlib import Path
from urllib.parse import quote

from picache.chunk import Header
from picache.errors import CorruptChunk, PICacheError
from picache.store.chunk_name import file_name
from picache.store.chunkfile import ChunkFile, pack
from picache.store.files import Files, LocalFiles
from picache.store.folder_index import FolderIndex, Totals
from picache.store.in_use import InUse
from picache.store.listed_index import ListedIndex
from picache.store.quantize import Encoded
from picache.store.remote import RemoteFiles
from picache.store.remote_calls import RemoteLimits
from picache.store.together import Packed
from picache.store.writers import being_written


def _text_of(path: str | os.PathLike[str]) -> str:
    """A URL, or the path of a local folder, in which ``~`` is the home folder."""
    if not isinstance(path, str | os.PathLike):
        raise PICacheError(
            f"path must be a local folder or an fsspec URL, got {type(path).__name__}: give "
            "path='~/chunks' or path='s3://bucket/chunks'"
        )
    text = os.fspath(path).removeprefix("file://")
    try:
        return text if "://" in text else os.fspath(Path(text).expanduser())
    except RuntimeError as error:
        raise PICacheError(
            f"cannot keep chunks in {text}: {error}; give an absolute path"
        ) from error


class Disk:
    """The chunk files of one namespace and storage, under a path or URL.

    Two processes that write one key both write the same chunk; the last one stays. Every method
    raises what the file system, the index or the network raised; `ChunkStore` makes misses of it.

    Args:
        path: a local folder or an fsspec URL.
        disk_bytes: the most bytes of files; None for no bound.
        eviction: see `Tier`.
        namespace: the tenant; each has a folder of its own.
        storage: how tensors are kept; each kind has a folder of its own.
        in_use: says what must not be deleted.
        limits: how long a URL is waited for.

    Attributes:
        where: the path or URL.
        read_only: whether chunks can be read there, and not written.
        budget: the bound in bytes; `math.inf` for none.
        corrupt: files that failed a check, and were removed.

    Raises:
        PICacheError: when `path` holds something else than a chunk store, one of another format
            version, does not answer, or cannot be written to.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        disk_bytes: float | None,
        eviction: str,
        namespace: str,
        storage: str,
        in_use: InUse,
        limits: RemoteLimits,
    ) -> None:
        folder = "ns=" + quote(namespace, safe="")
        if len(folder) > 200:
            raise PICacheError(
                f"namespace is {len(folder) - 3} characters long when quoted for a file name: "
                "give one of at most 197"
            )
        budget = math.inf if disk_bytes is None else disk_bytes
        self._namespace, self._storage = namespace, storage
        text = _text_of(path)
        below = f"{storage}/{folder}"
        self._files: Files
        self._index: FolderIndex | ListedIndex
        if "://" in text:
            self._files = remote = RemoteFiles(text, below, limits)
            self._index = ListedIndex(remote, budget, eviction, in_use)
        else:
            self._files = local = LocalFiles(Path(text), below)
            self._index = FolderIndex(local, budget, eviction, in_use)
        self.budget = self._index.budget
        self.where, self.read_only = self._files.where, self._files.read_only
        self.corrupt = 0
        if self.read_only and disk_bytes is not None:
            raise PICacheError(
                f"disk_bytes={disk_bytes} cannot be kept at {self.where}, which is read only: "
                "leave it out"
            )

    def __contains__(self, key: str) -> bool:
        return self._files.exists(file_name(key))

    def look(self) -> list[str]:
        """See what others left there; the keys deleted because they were over the bound."""
        return self._index.open()

    def holds(self, key: str) -> bool:
        """Whether the chunk is there, without asking a network."""
        return self._index.holds(key)

    def totals(self) -> Totals:
        """Chunks and bytes there, those of temporary files included."""
        return self._index.totals()

    def missing(self, keys: list[str]) -> int:
        """How many of these are not there."""
        return self._index.missing(keys)

    def trim(self) -> list[str]:
        """Delete the files that are the cheapest to lose until the rest fits the bound."""
        return self._index.trim()

    def write(self, key: str, header: Header, layers: list[Encoded], gone: list[str]) -> None:
        """Write a chunk; on any error nothing of it is left.

        Args:
            key: of the chunk.
            header: what it is.
            layers: its tensors.
            gone: takes up the keys deleted to make room, whatever happens next.
        """
        data = pack(key, header, layers)
        nbytes = sum(piece.nbytes for piece in data)
        name = file_name(key)
        temporary = self._files.temporary(name, nbytes)
        being_written.add(temporary.rpartition("/")[2])
        try:
            self._index.reserve(key, nbytes, temporary, gone)
            try:
                self._files.fill(temporary, data)
                self._index.publish(key, nbytes, header, temporary)
            except BaseException as error:
                try:
                    self._index.release(key, temporary)
                except Exception as second:  # the first is the cause; what is left is swept later
                    error.add_note(f"nor could {temporary} be deleted: {second}")
                raise
        finally:
            being_written.discard(temporary.rpartition("/")[2])
        self._files.settle(name)

    def open(self, key: str) -> "OpenChunk | None":
        """The chunk's file, its header checked; None when absent or damaged."""
        name = file_name(key)
        for attempts_left in (1, 0) if self._files.copies else (0,):
            try:
                file, version = self._files.open(name)
            except FileNotFoundError:  # never written, or evicted by another process
                self._index.missed(key)
                return None
            try:
                found = ChunkFile(file, key, self._namespace, self._storage, version)
            except CorruptChunk:
                if not attempts_left:
                    self.damaged(key, version)
            else:
                self._files.touch(name)
                return OpenChunk(self, key, found)
        return None

    def again(self, key: str, version: object) -> ChunkFile | None:
        """A second copy of a remote file that failed a check; None where there is no such thing."""
        if not self._files.copies:
            return None
        try:
            file, seen = self._files.open(file_name(key))
        except FileNotFoundError:  # deleted meanwhile
            return None
        if seen != version:  # another chunk's layers do not go with those read before
            file.close()
            return None
        return ChunkFile(file, key, self._namespace, self._storage, version)

    def damaged(self, key: str, version: object) -> None:
        """Forget a file that failed its check, and delete it; not one written in its place."""
        self.corrupt += 1
        if self._files.remove_version(file_name(key), version):
            self._index.forget(key)

    def clear(self) -> None:
        """Delete every file of this namespace and storage."""
        self._index.clear()


class OpenChunk:
    """A chunk on disk whose layers can be read.

    Attributes:
        file: what they are read from.
    """

    def __init__(self, disk: Disk, key: str, file: ChunkFile) -> None:
        self._disk, self._key, self.file = disk, key, file

    def layers(self, layers: range) -> Packed:
        """Layers that follow each other; a copy that fails its check is made a second time.

        Raises:
            CorruptChunk: when the file is damaged; it is not deleted yet.
            Exception: whatever the file system raises when it cannot be read.
        """
        try:
            return self.file.layers(layers)
        except CorruptChunk:
            second = self._disk.again(self._key, self.file.version)
            if second is None:
                raise
            self.file = second
            return second.layers(layers)
