"""Files that appear whole or not at all behind an fsspec URL."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typing_extensions import override

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

# Fields of a file's information that change when the file is written again, on one system or other.
VERSION = ("ETag", "etag", "md5Hash", "generation", "LastModified", "mtime", "created", "size")
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "r2"}


def open_files(path: str | os.PathLike[str], folder: str) -> Files:
    """The files in one folder of the store at `path`; the store is made when there is none yet.

    Args:
        path: a local folder or an fsspec URL such as ``s3://bucket/chunks``.
        folder: of the files, relative to `path`, with forward slashes.

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


class RemoteFiles(Files):
    """Files behind an fsspec URL; a file is copied to this machine as a whole to be read.

    In an object store an object appears at once or not at all. On other file systems a file is
    written under a temporary name and moved.

    Args:
        url: of the store.
        folder: the folder below it that these files are in.

    Raises:
        PICacheError: when the URL cannot be opened, holds something else than a chunk store, or
            cannot be written to.
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
        """Write a file that appears at once with its whole content."""
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

    @override
    def listing(self) -> dict[str, FileInfo]:
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

    @override
    def exists(self, name: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(f"{self._root}/{name}"))

    @override
    def write(self, name: str, data: list[memoryview]) -> None:
        self._put(f"{self._root}/{name}", b"".join(data))

    @override
    def remove(self, name: str) -> None:
        try:
            self._fs.rm_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return

    def _version(self, name: str) -> tuple[str, ...]:
        """The fields of `VERSION`, as far as this file system knows them."""
        self._fs.invalidate_cache()
        info = self._fs.info(f"{self._root}/{name}")
        return tuple(str(info.get(field)) for field in VERSION)

    @override
    def remove_version(self, name: str, version: object) -> bool:
        """Delete the file unless, as far as the file system tells, it was written again."""
        try:
            if self._version(name) != version:
                return False
        except FileNotFoundError:
            return True
        self.remove(name)
        return True

    @override
    def touch(self, name: str) -> None:
        """Does nothing: most remote file systems cannot set a time."""

    @override
    @contextmanager
    def local(self, name: str) -> Iterator[tuple[Path, object]]:
        """Gives a copy that is deleted at the end of the block; a mapping of it stays readable."""
        version = self._version(name)  # before the copy, so that a file written meanwhile differs
        with tempfile.TemporaryDirectory(prefix="picache-") as folder:
            path = Path(folder) / "chunk"
            path.write_bytes(self._fs.cat_file(f"{self._root}/{name}"))
            yield path, version
