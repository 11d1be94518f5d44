"""Files that appear whole or not at all: what a store needs of them, and a local folder."""

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

from picache.errors import PICacheError

MARKER = "picache-store.json"
MARKED = {"format": "picache-store", "version": 2}
SUFFIX = ".safetensors"
TEMPORARY = re.compile(r"\..*\.tmp")
STALE_SECONDS = 600.0  # a writer touches its file all the time; one silent for so long was killed


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and when a file was last used, in seconds since the epoch."""

    nbytes: int
    used: float


class Files(Protocol):
    """Named files of one store; a name is ``shard/key.safetensors``."""

    where: str

    def listing(self) -> dict[str, FileInfo]:
        """Every whole file; what killed writers left behind is not among them."""

    def exists(self, name: str) -> bool:
        """Whether the file is there now, whoever wrote it."""

    def write(self, name: str, data: list[memoryview]) -> None:
        """Make the file appear with this content at once; on any error nothing is left."""

    def remove(self, name: str) -> None:
        """Delete the file; one that is gone already is no error."""

    def remove_version(self, name: str, version: object) -> bool:
        """Delete the file if it is still that version of it; whether none is there now."""

    def touch(self, name: str) -> None:
        """Mark the file as used now, where the file system can."""

    def local(self, name: str) -> Any:
        """Context manager giving a local path to map and the version of the file, for as long as
        the block runs or the file is mapped; FileNotFoundError when there is none."""


def temporary_name(name: str) -> str:
    """A name beside `name` that no reader and no other writer uses."""
    parent, _, last = name.rpartition("/")
    return (
        f"{parent}/.{last}.{uuid.uuid4().hex}.tmp" if parent else f".{last}.{uuid.uuid4().hex}.tmp"
    )


def check_marker(marker: bytes | None, others: list[str], where: str) -> bool:
    """Whether the store has its marker; refuses what is not a chunk store of this version."""
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


class LocalFiles:
    """Files in a folder of this machine, written to a temporary name, synced and renamed."""

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
        """Fail now rather than at the first chunk where the folder cannot be written to."""
        probe = self._root / temporary_name("probe")
        probe.touch()
        probe.unlink()

    def _clean(self) -> None:
        """Remove what writers killed long ago left; a live one's file is younger."""
        for path in self._root.rglob(".*.tmp"):  # shards, never another tenant's folder
            try:
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
            except FileNotFoundError:  # its writer, or another cleaner, was faster
                continue

    def _write(self, path: Path, data: list[memoryview]) -> None:
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

    def listing(self) -> dict[str, FileInfo]:
        """Every whole file by name."""
        found = {}
        for path in self._root.glob(f"*/*{SUFFIX}"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # removed by another process meanwhile
                continue
            if not path.name.startswith("."):
                found[f"{path.parent.name}/{path.name}"] = FileInfo(stat.st_size, stat.st_mtime)
        return found

    def exists(self, name: str) -> bool:
        """Whether the file is there now."""
        return (self._root / name).is_file()

    def write(self, name: str, data: list[memoryview]) -> None:
        """Write, sync, rename; raises OSError with nothing left behind."""
        path = self._root / name
        path.parent.mkdir(exist_ok=True)
        self._write(path, data)

    def remove(self, name: str) -> None:
        """Delete the file if it is there."""
        (self._root / name).unlink(missing_ok=True)

    def remove_version(self, name: str, version: object) -> bool:
        """Delete the file unless a writer has put another in its place."""
        path = self._root / name
        try:
            if _version(path.stat()) != version:
                return False
        except FileNotFoundError:
            return True
        path.unlink(missing_ok=True)
        return True

    def touch(self, name: str) -> None:
        """Set the file's time, which other processes and later ones read as its last use."""
        try:
            os.utime(self._root / name)
        except OSError:  # evicted by another process, or another user's: nothing to mark
            return

    @contextmanager
    def local(self, name: str) -> Iterator[tuple[Path, object]]:
        """The path itself; no version where it cannot be read, so that nothing is deleted."""
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
    """What a rewritten file differs in; not its time, which readers set."""
    return stat.st_dev, stat.st_ino
