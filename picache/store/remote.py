"""Files that appear whole or not at all behind an fsspec URL."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from picache.errors import PICacheError
from picache.store.files import (
    MARKED,
    MARKER,
    SUFFIX,
    TEMPORARY,
    FileInfo,
    Files,
    LocalFiles,
    check_marker,
    temporary_name,
)

# What file systems say of a file that changes when it is written again.
VERSION = ("ETag", "etag", "md5Hash", "generation", "LastModified", "mtime", "created", "size")
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "r2"}


def open_files(path: str | os.PathLike[str], folder: str) -> Files:
    """The files under `folder` of the store at `path`, made when there is none yet.

    Args:
        path: a local folder, ``~`` for the home folder, or an fsspec URL such as
            ``s3://bucket/chunks``.
        folder: relative, with forward slashes.

    Raises:
        PICacheError: when `path` holds something else than a chunk store, one of another format
            version, or cannot be written to.
    """
    if not isinstance(path, str | os.PathLike):
        raise PICacheError(
            f"path must be a local folder or an fsspec URL, got {type(path).__name__}: give "
            "path='~/chunks' or path='s3://bucket/chunks'"
        )
    text = os.fspath(path)
    text = text.removeprefix("file://")
    if "://" in text:
        return RemoteFiles(text, folder)
    try:
        return LocalFiles(Path(text).expanduser(), folder)
    except RuntimeError as error:
        raise PICacheError(
            f"cannot keep chunks in {text}: {error}; give an absolute path"
        ) from error


class RemoteFiles:
    """Files behind an fsspec URL, copied here whole to be read.

    Object stores put an object at once or not at all; elsewhere a temporary name is moved.
    """

    def __init__(self, url: str, folder: str) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise PICacheError(
                f"{url} needs fsspec, which is not installed: pip install picache[storage], or "
                "give a local path"
            ) from error
        self.where = url
        try:
            self._fs, base = fsspec.core.url_to_fs(url)
            base = base.rstrip("/")
            self._root = f"{base}/{folder}"
            marker = f"{base}/{MARKER}"
            held = self._fs.cat_file(marker) if self._fs.exists(marker) else None
            others = self._fs.ls(base, detail=False) if self._fs.exists(base) else []
            names = (str(path).rstrip("/").rpartition("/")[2] for path in others)
            names = (name for name in names if name and name != MARKER)
            if not check_marker(held, sorted(n for n in names if not TEMPORARY.match(n)), url):
                self._put(marker, json.dumps(MARKED).encode())
        except (OSError, ImportError, NotImplementedError) as error:
            raise PICacheError(
                f"cannot keep chunks in {url}: {error}; give a URL that can be written to"
            ) from error
        except ValueError as error:
            if isinstance(error, PICacheError):
                raise
            raise PICacheError(f"{url} is no URL that fsspec can open: {error}") from error

    def _put(self, path: str, data: bytes) -> None:
        protocol = self._fs.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        if protocols & OBJECT_STORES:
            self._fs.pipe_file(path, data)
            return
        temporary = temporary_name(path)
        try:
            self._fs.pipe_file(temporary, data)
            self._fs.mv(temporary, path)
        except BaseException:
            if self._fs.exists(temporary):
                self._fs.rm_file(temporary)
            raise

    def listing(self) -> dict[str, FileInfo]:
        """Every whole file by name; the age is unknown."""
        self._fs.invalidate_cache()  # other processes write here too
        if not self._fs.exists(self._root):
            return {}
        found = self._fs.find(self._root, detail=True)
        names = {"/".join(path.rsplit("/", 2)[1:]): info for path, info in found.items()}
        return {
            name: FileInfo(int(info["size"]), 0.0)
            for name, info in names.items()
            if name.endswith(SUFFIX)
        }

    def exists(self, name: str) -> bool:
        """Whether the file is there now."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(f"{self._root}/{name}"))

    def write(self, name: str, data: list[memoryview]) -> None:
        """Put, or put and move; raises OSError."""
        self._put(f"{self._root}/{name}", b"".join(data))

    def remove(self, name: str) -> None:
        """Delete the file if it is there."""
        try:
            self._fs.rm_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return

    def _version(self, name: str) -> tuple[str, ...]:
        """As much of `VERSION` as this file system knows."""
        self._fs.invalidate_cache()
        info = self._fs.info(f"{self._root}/{name}")
        return tuple(str(info.get(field)) for field in VERSION)

    def remove_version(self, name: str, version: object) -> bool:
        """Delete the file unless it was written again since, as far as the file system says."""
        try:
            if self._version(name) != version:
                return False
        except FileNotFoundError:
            return True
        self.remove(name)
        return True

    def touch(self, name: str) -> None:
        """Nothing: most remote file systems cannot."""

    @contextmanager
    def local(self, name: str) -> Iterator[tuple[Path, object]]:
        """A copy that is deleted at the end; a mapping of it stays readable."""
        version = self._version(name)  # before the copy: one written meanwhile is another
        with tempfile.TemporaryDirectory(prefix="picache-") as folder:
            path = Path(folder) / "chunk"
            path.write_bytes(self._fs.cat_file(f"{self._root}/{name}"))
            yield path, version
