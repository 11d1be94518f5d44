"""Compiled chunks as safetensors files, each of which is checked before it is used.

There is one file for each chunk. Its ``__metadata__`` holds the format, the key, the chunk's
`Header`, a checksum for each layer, and one over all of these. The checksum of a layer covers
names, dtypes, shapes and bytes. They find damage, a file under a wrong name, and a file of another
tenant or storage. They do not stop somebody who can write to the folder from making a file with
valid checksums; but nothing in a file is ever executed.

So a layer's checksum need not be cryptographic: it is XXH3 of 128 bits, which takes a small part of
the time of SHA-256 (docs/results/hashes.json). What stands over all fields, the tenant's name among
them, is SHA-256.
"""

import hashlib
import json
import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from io import FileIO
from stat import S_ISREG
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from picache.chunk import DTYPES, Header
from picache.errors import CorruptChunk
from picache.store.files import open_regular
from picache.store.quantize import FP8, KEPT_AS, PARTS, Encoded
from picache.store.together import Form, Packed, Place

FORMAT = "picache-chunk/3"
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    FP8: "F8_E4M3",
}
_DTYPES = {code: dtype for dtype, code in CODES.items()}
LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
KEPT_OPEN = 128  # a process may often open 1,024 files, and has others to open
_open_files = threading.BoundedSemaphore(KEPT_OPEN)

Buffer = bytearray | memoryview


class _Digest(Protocol):
    def update(self, data: Any, /) -> object: ...

    def hexdigest(self) -> str: ...


# How layers are checked in files of each format that is read.
_DIGESTS: dict[str, Callable[[], _Digest]] = {
    FORMAT: xxhash.xxh3_128,
    "picache-chunk/2": hashlib.sha256,
}


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _checksum(parts: Mapping[str, tuple[Place | Tensor, memoryview]], form: str = FORMAT) -> str:
    """The checksum of a layer in a file of a format, of its tensors' dtypes, shapes and bytes."""
    digest = _DIGESTS[form]()
    for name in sorted(parts):
        tensor, data = parts[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(data)
    return digest.hexdigest()


def _seal(metadata: dict[str, str]) -> str:
    """SHA-256 over all fields of the metadata but the one it is kept in."""
    rest = {name: value for name, value in metadata.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def pack(key: str, header: Header, layers: list[Encoded]) -> list[memoryview]:
    """The bytes of a chunk's safetensors file, in pieces so that nothing is copied twice.

    `safetensors.torch.save` writes the same bytes, but copies the whole chunk once more.

    Args:
        key: of the chunk.
        header: of the chunk.
        layers: as encoded for storage.
    """
    held = [{name: part.cpu().contiguous() for name, part in layer.items()} for layer in layers]
    read = [{name: (part, _bytes(part)) for name, part in layer.items()} for layer in held]
    metadata = {
        "format": FORMAT,
        "key": key,
        "header": json.dumps(asdict(header), sort_keys=True),
        "checksums": json.dumps([_checksum(layer) for layer in read]),
    }
    metadata["checksum"] = _seal(metadata)
    named = [(f"{i}.{name}", part) for i, layer in enumerate(held) for name, part in layer.items()]
    named.sort(key=lambda pair: -pair[1].itemsize)  # so that each tensor is aligned to its elements
    entries: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, part in named:
        entries[name] = {
            "dtype": CODES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [offset, offset + part.nbytes],
        }
        offset += part.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return [
        memoryview(len(text).to_bytes(8, "little") + text),
        *(_bytes(part) for _, part in named),
    ]


def _number(value: object) -> int:
    """A size or an offset as JSON gives it; ValueError for anything else."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def _places(entries: dict[str, Any], begin: int, end: int) -> dict[str, Place]:
    """The tensors a safetensors header lists, which must fill the file from `begin` to `end`."""
    found = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = map(_number, entry["data_offsets"])
        shape = tuple(map(_number, entry["shape"]))
        found[name] = place = Place(begin, _DTYPES[entry["dtype"]], shape)
        if last - first != place.nbytes:
            raise ValueError(f"{name} does not take the bytes of its shape")
        begin += place.nbytes
    if begin != end:
        raise ValueError(f"its tensors end at byte {begin} of {end}")
    return found


def _runs(places: list[Place]) -> list[tuple[int, int]]:
    """Where places of a file, in its order, begin, and their bytes; neighbours are one."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and sum(runs[-1]) == place.begin:
            runs[-1] = runs[-1][0], runs[-1][1] + place.nbytes
        else:
            runs.append((place.begin, place.nbytes))
    return runs


def _read_header(text: str) -> Header:
    """The chunk's `Header` out of JSON; ValueError or TypeError when a field is of another type."""
    header = Header(**json.loads(text))
    for field in fields(Header):
        value = getattr(header, field.name)
        if field.name == "tokens":
            _number(value)
        elif field.name == "compile_seconds":
            if value is not None and not (type(value) in (int, float) and 0 <= value < math.inf):
                raise ValueError(f"compile_seconds is {value!r}")
        elif not isinstance(value, str):
            raise ValueError(f"{field.name} is {value!r}")
    return header


class ChunkFile:
    """A chunk's file with its header checked; layers are checked as they are read.

    What is read is read into memory of our own. A mapping would do without the copy, but whoever
    cuts a mapped file short kills every process that touches what was lost (SIGBUS), and what was
    checked could be changed before it is used. The file stays open, so that it can be read to its
    end after it was deleted or replaced; beyond `KEPT_OPEN` of them it is opened anew for each
    layer, and one that is another by then is an error.

    Args:
        file: opened for reading; it is closed with this.
        key: that the file must have been written for.
        namespace: that it must belong to.
        storage: that it must be of.
        version: which version of the file this is, for `Files.remove_version`.

    Attributes:
        header: of the chunk.
        nbytes: bytes of the file.
        version: as handed in.

    Raises:
        CorruptChunk: when the file is damaged or is not that chunk; says what was seen.
        OSError: when it cannot be read.
    """

    def __init__(
        self, file: FileIO, key: str, namespace: str, storage: str, version: object = None
    ) -> None:
        self._key, self.version = key, version
        self._stat = os.fstat(file.fileno())
        self._turn = threading.Lock()
        self._file: FileIO | None = file
        self._path = file.name if isinstance(file.name, str) else None
        try:
            self._check(namespace, storage)
        except BaseException:
            file.close()
            raise
        if self._path is None:
            weakref.finalize(self, file.close)
        elif _open_files.acquire(blocking=False):
            weakref.finalize(self, _let_go, file, _open_files)
        else:
            file.close()
            self._file = None

    def _check(self, namespace: str, storage: str) -> None:
        if not S_ISREG(self._stat.st_mode):
            raise self._corrupt("is no regular file")
        self.nbytes = self._stat.st_size
        size = int.from_bytes(self._read(0, bytearray(8)), "little")
        if size > min(self.nbytes, LONGEST_HEADER):
            raise self._corrupt(f"is no safetensors file: its header would be {size} bytes long")
        header = bytes(self._read(8, bytearray(size)))  # an error of a store is none of the file's
        try:
            entries = json.loads(header)
            metadata = entries.pop("__metadata__", {})
            if not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("its metadata are no texts")
        except (AttributeError, RecursionError, TypeError, ValueError) as error:
            raise self._corrupt(f"is no safetensors file: {error}") from error
        self._format = metadata.get("format", "")
        if self._format not in _DIGESTS:
            known = " or ".join(map(repr, _DIGESTS))
            raise self._corrupt(f"is of format {self._format!r}, not {known}")
        if metadata.get("checksum") != _seal(metadata):
            raise self._corrupt("has a header that fails its checksum")
        try:
            self.header = _read_header(metadata["header"])
            self._checksums = list(json.loads(metadata["checksums"]))
            found = (metadata["key"], self.header.namespace, self.header.storage)
            self._places = _places(entries, 8 + size, self.nbytes)
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise self._corrupt(f"has a header that cannot be understood: {error}") from error
        if found != (self._key, namespace, storage):
            raise self._corrupt(
                f"was written for (key, namespace, storage) = {found}, not "
                f"{(self._key, namespace, storage)}"
            )
        layers = range(len(self._checksums))
        names = {f"{i}.{part}" for i in layers for part in PARTS[storage]}
        if set(self._places) != names or self.header.dtype not in DTYPES:
            raise self._corrupt("does not hold the layers that its header lists")
        dtype = KEPT_AS.get(storage, DTYPES[self.header.dtype])
        for name in (f"{i}.{part}" for i in layers for part in ("keys", "values")):
            place = self._places[name]
            if place.dtype != dtype or place.shape[2:3] != (self.header.tokens,):
                raise self._corrupt(f"holds {name} of {place.dtype} and shape {place.shape}")

    def _corrupt(self, what: str) -> CorruptChunk:
        return CorruptChunk(f"chunk {self._key} {what}: it is not used; compile it again")

    def __len__(self) -> int:
        return len(self._checksums)

    def layers(self, layers: range) -> Packed:
        """Layers that follow each other, in memory of the host.

        It is page-locked where there is a CUDA device. What stands side by side in the file is
        read at once.

        Raises:
            CorruptChunk: when one is not what was written.
            OSError: when they cannot be read.
        """
        names = [(index, part) for index in layers for part in PARTS[self.header.storage]]
        stored = [(self._places[f"{index}.{part}"], index, part) for index, part in names]
        stored.sort(key=lambda one: (-one[0].dtype.itemsize, one[0].begin))
        packed = Packed.empty(
            [
                Form(index - layers.start, part, place.dtype, place.shape)
                for place, index, part in stored
            ]
        )
        memory, done = _bytes(packed.memory), 0
        for begin, nbytes in _runs([place for place, _, _ in stored]):
            self._read(begin, memory[done : done + nbytes])
            done += nbytes
        for index, places in zip(layers, packed.places, strict=True):
            parts = {part: (one, memory[one.begin : one.end]) for part, one in places.items()}
            if _checksum(parts, self._format) != self._checksums[index]:
                raise self._corrupt(f"fails the checksum of layer {index}")
        return packed

    def _read(self, begin: int, into: Buffer) -> Buffer:
        """Fill `into` from byte `begin` on; the same buffer."""
        try:
            if self._file is not None:
                with self._turn:  # a file has one place where it is read
                    return self._fill(self._file, begin, into)
            assert self._path is not None
            with open_regular(self._path) as file:
                now = os.fstat(file.fileno())
                if (now.st_dev, now.st_ino) != (self._stat.st_dev, self._stat.st_ino):
                    raise self._corrupt("was written again while in use")
                return self._fill(file, begin, into)
        except FileNotFoundError as error:
            raise self._corrupt("was deleted while in use") from error

    def _fill(self, file: FileIO, begin: int, into: Buffer) -> Buffer:
        view = memoryview(into)
        file.seek(begin)
        while len(view):
            count = file.readinto(view)
            if not count:
                raise self._corrupt("was cut short")
            view = view[count:]
        return into


def _let_go(file: FileIO, among: threading.BoundedSemaphore) -> None:
    file.close()
    among.release()
