"""Files that appear whole or not at all: what a store needs of them, and a local folder's."""

import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import override

from picache.errors import PICacheError

MARKER = "picache-store.json"
MARKED = {"format": "picache-store", "version": 2}
SUFFIX = ".safetensors"
TEMPORARY = re.compile(r"\..*\.tmp")
STALE_SECONDS = 600.0  # a temporary file not written to for so long was left by a killed process


@dataclass(frozen=True)
class FileInfo:
    """What a listing tells of a file.

    Attributes:
        nbytes: its size.
        used: when it was last used, in seconds since the epoch; 0 where that is not known.
    """

    nbytes: int
    used: float


class Files(Protocol):
    """The files of one store by name; a name is ``shard/key.safetensors``.

    Attributes:
        where: the path or URL of the store, as text.
    """

    where: str

    def listing(self) -> dict[str, FileInfo]:
        """Every whole file by name, without the temporary ones of writers."""

    def exists(self, name: str) -> bool:
        """Whether the file is there now, whichever process wrote it."""

    def write(self, name: str, data: list[memoryview]) -> None:
        """Write a file that appears at once with its whole content, or not at all on OSError."""

    def remove(self, name: str) -> None:
        """Delete the file; it is no error if it is gone already."""

    def remove_version(self, name: str, version: object) -> bool:
        """Delete the file if it is still that version; returns whether none is there now."""

    def touch(self, name: str) -> None:
        """Mark the file as used now, where the file system can do that."""

    def local(self, name: str) -> Any:
        """A context manager that gives a local path to map, and the version of the file there.

        The path is good inside the block, the mapping for as long as it exists. The version is None
        where it cannot be told.

        Raises:
            FileNotFoundError: when there is no such file.
        """


def temporary_name(name: str) -> str:
    """A name in the folder of `name` that no reader and no other writer uses."""
    parent, _, last = name.rpartition("/")
    return (
        f"{parent}/.{last}.{uuid.uuid4().hex}.tmp" if parent else f".{last}.{uuid.uuid4().hex}.tmp"
    )


def check_marker(marker: bytes | None, others: list[str], where: str) -> bool:
    """Whether a folder is marked as a chunk store; PICacheError when it holds something else.

    Args:
        marker: content of the marker file; None when there is none.
        others: names of what else is there.
        where: the path or URL, for errors.
    """
    if marker is None:
        if others:
            raise PICacheError(
                f"{where} is not a chunk store: it holds {others[0]!r} and no {MARKER}; "
                "give an empty or new folder"
            )
        return False
    try:
        found = json.loads(marker)
    except ValueError:
        found = marker[:40]
    if found != MARKED:
        raise PICacheError(
            f"{where}/{MARKER} says {found}, this version of picache reads {MARKED}: "
            "give another folder, or delete this one"
        )
    return True


class LocalFiles(Files):
    """Files in a local folder, written under a temporary name, synced and renamed.

    Args:
        root: folder of the store.
        folder: the folder below it that these files are in.

    Raises:
        PICacheError: when `root` holds something else than a chunk store, or cannot be written to.
    """

    def __init__(self, root: Path, folder: str) -> None:
        self.where = str(root)
        self._root = root / folder
        try:
            root.mkdir(parents=True, exist_ok=True)
            marker = root / MARKER
            others = sorted(n for n in os.listdir(root) if n != MARKER and not TEMPORARY.match(n))
            if not check_marker(
                marker.read_bytes() if marker.exists() else None, others, str(root)
            ):
                self._write(marker, [memoryview(json.dumps(MARKED).encode())])
            self._root.mkdir(parents=True, exist_ok=True)
            self._clean()
            self._probe()
        except OSError as error:
            raise PICacheError(
                f"cannot keep chunks in {root}: {error.strerror or error}; give a folder that "
                "can be written to"
            ) from error

    def _probe(self) -> None:
        """Write a file, so that a folder that cannot be written to fails now and not later."""
        probe = self._root / temporary_name("probe")
        probe.touch()
        probe.unlink()

    def _clean(self) -> None:
        """Remove temporary files that were left by processes killed long ago."""
        for path in self._root.rglob(".*.tmp"):  # shards, never another tenant's folder
            try:
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
            except FileNotFoundError:  # its writer, or another cleaner, was faster
                continue

    def _write(self, path: Path, data: list[memoryview]) -> None:
        """Write under a temporary name, sync, and rename; on any error remove it again."""
        temporary = path.parent / temporary_name(path.name)
        try:
            with temporary.open("xb") as file:
                file.writelines(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if os.name == "posix":  # the new name reaches the disk with its folder
            parent = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)

    @override
    def listing(self) -> dict[str, FileInfo]:
        found = {}
        for path in self._root.glob(f"*/*{SUFFIX}"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # removed by another process meanwhile
                continue
            if not path.name.startswith("."):
                found[f"{path.parent.name}/{path.name}"] = FileInfo(stat.st_size, stat.st_mtime)
        return found

    @override
    def exists(self, name: str) -> bool:
        return (self._root / name).is_file()

    @override
    def write(self, name: str, data: list[memoryview]) -> None:
        path = self._root / name
        path.parent.mkdir(exist_ok=True)
        self._write(path, data)

    @override
    def remove(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    @override
    def remove_version(self, name: str, version: object) -> bool:
        path = self._root / name
        try:
            if _version(path.stat()) != version:
                return False
        except FileNotFoundError:
            return True
        path.unlink(missing_ok=True)
        return True

    @override
    def touch(self, name: str) -> None:
        """Set the file's time of modification, which every process takes for its last use."""
        try:
            os.utime(self._root / name)
        except OSError:  # evicted by another process, or another user's: nothing to mark
            return

    @override
    @contextmanager
    def local(self, name: str) -> Iterator[tuple[Path, object]]:
        """Gives the path itself; no version if the file cannot be read, so that it is kept."""
        path = self._root / name
        try:
            file = path.open("rb")  # while it is open or mapped, its inode is no other file's
        except FileNotFoundError:
            raise
        except OSError:
            yield path, None
            return
        with file:
            yield path, _version(os.fstat(file.fileno()))


def _version(stat: os.stat_result) -> tuple[int, int]:
    """Device and inode, which change when a file is written anew; its time is set by readers."""
    return stat.st_dev, stat.st_ino
