"""Files that appear whole or not at all: what a store needs of them, and a local folder's."""

import json
import os
import time
from io import FileIO
from pathlib import Path
from typing import Protocol

from typing_extensions import override

from picache.errors import PICacheError
from picache.store.writers import STALE_SECONDS, TEMPORARY, temporary_name

__all__ = ["MARKED", "MARKER", "STALE_SECONDS", "SUFFIX", "Files", "LocalFiles", "check_marker"]

MARKER = "picache-store.json"
MARKED = {"format": "picache-store", "version": 2}
SUFFIX = ".safetensors"


class Files(Protocol):
    """The files of one store by name; a name is ``shard/key.safetensors``.

    Attributes:
        where: the path or URL of the store, as text.
        read_only: whether nothing can be written there.
        copies: whether a file is copied to this machine to be read, and the copy may be damaged.
    """

    where: str
    read_only: bool
    copies: bool

    def exists(self, name: str) -> bool:
        """Whether the file is there now, whichever process wrote it."""

    def open(self, name: str) -> tuple[FileIO, object]:
        """The file opened for reading, and its version; FileNotFoundError when there is none."""

    def temporary(self, name: str, nbytes: int) -> str:
        """The name that `fill` writes to before `publish` makes it `name`; they may be one."""

    def fill(self, temporary: str, data: list[memoryview]) -> None:
        """Write the content, down to the disk."""

    def publish(self, temporary: str, name: str) -> None:
        """Give a filled file its name, at once, in place of one that has it."""

    def settle(self, name: str) -> None:
        """Bring a published or removed name down to the disk too."""

    def remove(self, name: str) -> None:
        """Delete the file; it is no error if it is gone already."""

    def remove_version(self, name: str, version: object) -> bool:
        """Delete the file if it is still that version; returns whether none is there now."""

    def touch(self, name: str) -> None:
        """Mark the file as used now, where the file system can do that."""


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
    except (ValueError, RecursionError):
        found = marker[:40]
    if found != MARKED:
        raise PICacheError(
            f"{where}/{MARKER} says {found}, this version of picache reads {MARKED}: "
            "give another folder, or delete this one"
        )
    return True


def open_regular(path: str) -> FileIO:
    """A file opened for reading; what is no file, such as a pipe, is opened without waiting."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return FileIO(path, "r", opener=lambda name, _: os.open(name, flags))


class LocalFiles(Files):
    """Files in a local folder, written under a temporary name, synced and renamed.

    Temporary files lie in the folder itself, above the shards.

    Args:
        root: folder of the store.
        folder: the folder below it that these files are in.

    Raises:
        PICacheError: when `root` holds something else than a chunk store, or cannot be written to.
    """

    read_only = copies = False

    def __init__(self, root: Path, folder: str) -> None:
        self.where = str(root)
        self.root = root / folder
        try:
            root.mkdir(parents=True, exist_ok=True)
            marker = root / MARKER
            others = sorted(n for n in os.listdir(root) if n != MARKER and not TEMPORARY.match(n))
            if not check_marker(
                marker.read_bytes() if marker.exists() else None, others, str(root)
            ):
                temporary = root / temporary_name(MARKER)
                try:
                    _write(temporary, [memoryview(json.dumps(MARKED).encode())])
                    os.replace(temporary, marker)
                finally:
                    temporary.unlink(missing_ok=True)
                _sync(root)
            self.root.mkdir(parents=True, exist_ok=True)
            self.probe([self.root])
        except OSError as error:
            raise PICacheError(
                f"cannot keep chunks in {root}: {error.strerror or error}; give a folder that "
                "can be written to"
            ) from error

    def probe(self, folders: list[Path]) -> None:
        """Raise OSError now rather than half way where files cannot be made and deleted."""
        for folder in folders:
            probe = folder / temporary_name("probe")
            probe.touch()
            probe.unlink(missing_ok=True)

    @override
    def exists(self, name: str) -> bool:
        return os.path.isfile(self.root / name)

    @override
    def open(self, name: str) -> tuple[FileIO, object]:
        """The file itself; while it is open, its inode is no other file's."""
        file = open_regular(str(self.root / name))
        return file, _version(os.fstat(file.fileno()))

    @override
    def temporary(self, name: str, nbytes: int) -> str:
        """A name in the folder itself."""
        return temporary_name(name.rpartition("/")[2], nbytes)

    @override
    def fill(self, temporary: str, data: list[memoryview]) -> None:
        _write(self.root / temporary, data)

    @override
    def publish(self, temporary: str, name: str) -> None:
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        os.replace(self.root / temporary, path)
        self.touch(name)

    @override
    def settle(self, name: str) -> None:
        """Sync the folder, which the name is in."""
        _sync((self.root / name).parent)

    @override
    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    @override
    def remove_version(self, name: str, version: object) -> bool:
        path = self.root / name
        try:
            if _version(path.lstat()) != version:
                return False
        except FileNotFoundError:
            return True
        path.unlink(missing_ok=True)
        return True

    @override
    def touch(self, name: str) -> None:
        """Set the file's time of modification, which every process takes for its last use.

        The system's own stamp is some milliseconds coarse, in which several chunks are used; but
        it is all that may be set on another user's file.
        """
        now = time.time_ns()
        try:
            try:
                os.utime(self.root / name, ns=(now, now))
            except PermissionError:
                os.utime(self.root / name)
        except OSError:  # evicted by another process, or not ours to write: nothing to mark
            return


def _write(path: Path, data: list[memoryview]) -> None:
    with path.open("xb") as file:
        file.writelines(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """A new name reaches the disk with its folder."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _version(stat: os.stat_result) -> tuple[int, int]:
    """Device and inode, which change when a file is written anew; its time is set by readers."""
    return stat.st_dev, stat.st_ino
