"""Files that appear whole or not at all behind an fsspec URL."""

import json
from collections.abc import Callable
from functools import partial
from io import FileIO
from typing import Any

from typing_extensions import override

from picache.errors import PICacheError
from picache.store.files import MARKED, MARKER, SUFFIX, Files, check_marker
from picache.store.ranged_copy import RangedCopy
from picache.store.remote_calls import RemoteCalls, RemoteLimits
from picache.store.writers import TEMPORARY, temporary_name

# Fields of a file's information that change when the file is written again, on one system or other.
VERSION = ("ETag", "etag", "md5Hash", "generation", "LastModified", "mtime", "created", "size")
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "r2"}
WEB = {"http", "https"}


class RemoteFiles(Files):
    """Files behind an fsspec URL; of a file, what is read is copied to this machine.

    Object stores put an object at once or not at all; elsewhere a temporary name is moved. The web
    is read only: a store that is served there needs its marker, and its files have their names.

    Raises:
        PICacheError: when the URL cannot be opened, holds something else than a chunk store, or
            does not answer; nothing is written then.
    """

    copies = True

    def __init__(self, url: str, folder: str, limits: RemoteLimits) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise PICacheError(
                f"{url} needs fsspec, which is not installed: pip install picache[storage], or "
                "give a local path"
            ) from error
        self.where = url
        self._call = RemoteCalls(limits)
        try:
            self._fs, base = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise PICacheError(f"cannot keep chunks in {url}: {error}") from error
        except Exception as error:  # of the URL's own client, of any type
            raise PICacheError(f"{url} is no URL that fsspec can open: {error}") from error
        base = base.rstrip("/")
        self._root = f"{base}/{folder}"
        protocol = self._fs.protocol
        self._protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self.read_only = bool(self._protocols & WEB)
        try:
            self._enter(base)
        except PICacheError:
            raise
        except Exception as error:
            raise PICacheError(
                f"cannot keep chunks in {url}: {type(error).__name__}: {error}; give a URL that "
                "answers and can be written to"
            ) from error

    def _enter(self, base: str) -> None:
        """Find the store's marker, or leave one where nothing is."""
        marker = f"{base}/{MARKER}"
        held = self._ask(self._fs.cat_file, marker, none=None)
        if self.read_only:
            if held is None:
                raise PICacheError(
                    f"{self.where} is read only and has no {MARKER}: give the URL of a folder "
                    "that a chunk store was made in"
                )
            check_marker(held, [], self.where)
            return
        others = [] if held is not None else self._ask(self._fs.ls, base, none=[], detail=False)
        names = (str(path).rstrip("/").rpartition("/")[2] for path in others)
        names = (name for name in names if name and name != MARKER)
        if not check_marker(held, sorted(n for n in names if not TEMPORARY.match(n)), self.where):
            temporary = marker if self._at_once else temporary_name(marker)
            try:
                self._put(temporary, json.dumps(MARKED).encode())
                if temporary != marker:
                    self._call(self._fs.mv, temporary, marker)
            except BaseException:
                self._ask(self._fs.rm_file, temporary, none=None)
                raise

    @property
    def _at_once(self) -> bool:
        """Whether a put object appears whole or not at all."""
        return bool(self._protocols & OBJECT_STORES)

    def _ask(self, call: Callable[..., Any], path: str, none: Any, **named: Any) -> Any:
        """What the file system answers about a path, `none` where that is not there."""
        self._fs.invalidate_cache()  # other processes write here too
        try:
            return self._call(call, path, **named)
        except FileNotFoundError:
            return none

    def _put(self, path: str, data: bytes) -> None:
        self._call(self._fs.makedirs, path.rpartition("/")[0], exist_ok=True)
        self._call(self._fs.pipe_file, path, data, nbytes=len(data))

    def listing(self) -> dict[str, int]:
        """Bytes of every file by name, temporary ones included; none of a read-only URL."""
        if self.read_only:  # a web server lists nothing, and there is no bound to keep
            return {}
        found = self._ask(self._fs.find, self._root, none={}, detail=True)
        return {
            "/".join(path.rsplit("/", 2)[1:]): int(info["size"] or 0)
            for path, info in found.items()
            if path.endswith((SUFFIX, ".tmp"))
        }

    @override
    def exists(self, name: str) -> bool:
        return bool(self._ask(self._fs.exists, f"{self._root}/{name}", none=False))

    @override
    def open(self, name: str) -> tuple[FileIO, object]:
        """A copy that nobody else sees, fetched as it is read, and gone when it is closed."""
        path = f"{self._root}/{name}"
        info = self._info(name)  # before the copy: one written meanwhile is another
        size = int(info.get("size") or 0)
        in_ranges = info.get("partial", False) if self._protocols & WEB else True
        if not size or not in_ranges:
            return RangedCopy.of(self._call(self._fs.cat_file, path, nbytes=size)), _version(info)
        return RangedCopy(size, partial(self._range, path)), _version(info)

    def _range(self, path: str, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` of a file."""
        nbytes = end - begin
        data: bytes = self._call(self._fs.cat_file, path, start=begin, end=end, nbytes=nbytes)
        return data

    @override
    def temporary(self, name: str, nbytes: int) -> str:
        """A name beside it; the name itself where an object appears whole."""
        return name if self._at_once else temporary_name(name, nbytes)

    @override
    def fill(self, temporary: str, data: list[memoryview]) -> None:
        self._put(f"{self._root}/{temporary}", b"".join(data))

    @override
    def publish(self, temporary: str, name: str) -> None:
        if temporary != name:
            self._call(self._fs.mv, f"{self._root}/{temporary}", f"{self._root}/{name}")

    @override
    def settle(self, name: str) -> None:
        """Nothing: what a remote file system has answered for, it has."""

    @override
    def remove(self, name: str) -> None:
        self._ask(self._fs.rm_file, f"{self._root}/{name}", none=None)

    def _info(self, name: str) -> dict[str, Any]:
        self._fs.invalidate_cache()
        return dict(self._call(self._fs.info, f"{self._root}/{name}"))

    @override
    def remove_version(self, name: str, version: object) -> bool:
        if self.read_only:
            return False
        try:
            if _version(self._info(name)) != version:
                return False
        except FileNotFoundError:
            return True
        self.remove(name)
        return True

    @override
    def touch(self, name: str) -> None:
        """Does nothing: most remote file systems cannot set a time."""


def _version(info: dict[str, Any]) -> tuple[str, ...]:
    """As much of `VERSION` as this file system knows."""
    return tuple(str(info.get(field)) for field in VERSION)
