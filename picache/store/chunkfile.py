"""Compiled chunks as safetensors files, each of which is checked before it is used.

There is one file for each chunk. Its ``__metadata__`` holds the format, the key, the chunk's
`Header`, a checksum for each layer, and one over all of these. The checksum of a layer covers
names, dtypes, shapes and bytes. They find damage, a file under a wrong name, and a file of another
tenant or storage. They do not stop somebody who can write to the folder from making a file with
valid checksums; but nothing in a file is ever executed.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from picache.chunk import DTYPES, Header
from picache.errors import CorruptChunk
from picache.store.quantize import FP8, KEPT_AS, PARTS, Encoded

FORMAT = "picache-chunk/2"
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    FP8: "F8_E4M3",
}


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _checksum(parts: Encoded) -> str:
    """SHA-256 of a layer; twice as fast as BLAKE2b where the processor has SHA instructions."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        tensor = parts[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
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
    metadata = {
        "format": FORMAT,
        "key": key,
        "header": json.dumps(asdict(header), sort_keys=True),
        "checksums": json.dumps([_checksum(layer) for layer in held]),
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


def _copy(mapped: Tensor) -> Tensor:
    """A copy of a mapped tensor, page-locked where there is a CUDA device to copy it to."""
    own = torch.empty_like(mapped, pin_memory=torch.cuda.is_available())
    return own.copy_(mapped)


class ChunkFile:
    """The file of a chunk, mapped into memory; the header is checked now, layers as they are read.

    Args:
        path: a local path; the file may be deleted or replaced afterwards.
        key: the key that the file must have been written for.
        namespace: the namespace that it must belong to.
        storage: the storage that it must have.
        version: which version of the file this is, for `Files.remove_version`.

    Attributes:
        header: of the chunk.
        nbytes: bytes of the file.
        version: as handed in.

    Raises:
        CorruptChunk: when the file is damaged or is not that chunk; says what was seen.
        FileNotFoundError: when there is none.
    """

    def __init__(
        self, path: Path, key: str, namespace: str, storage: str, version: object = None
    ) -> None:
        self._path, self._key, self.version = path, key, version
        try:
            self._stat = os.stat(path)
            self._file = safe_open(path, framework="pt")
            metadata = self._file.metadata() or {}
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError) as error:
            raise self._corrupt(f"cannot be read: {error}") from error
        if metadata.get("format") != FORMAT:
            raise self._corrupt(f"is of format {metadata.get('format')!r}, not {FORMAT!r}")
        if metadata.get("checksum") != _seal(metadata):
            raise self._corrupt("has a header that fails its checksum")
        try:
            self.header = Header(**json.loads(metadata["header"]))
            self._checksums = list(json.loads(metadata["checksums"]))
            found = (metadata["key"], self.header.namespace, self.header.storage)
        except (KeyError, TypeError, ValueError) as error:
            raise self._corrupt(f"has a header that cannot be understood: {error}") from error
        if found != (key, namespace, storage):
            raise self._corrupt(
                f"was written for (key, namespace, storage) = {found}, not "
                f"{(key, namespace, storage)}"
            )
        names = {f"{i}.{part}" for i in range(len(self._checksums)) for part in PARTS[storage]}
        if set(self._file.keys()) != names or self.header.dtype not in DTYPES:
            raise self._corrupt("does not hold the layers that its header lists")
        self.nbytes = self._stat.st_size

    def _corrupt(self, what: str) -> CorruptChunk:
        return CorruptChunk(f"chunk {self._key} {what}: it is not used; compile it again")

    def __len__(self) -> int:
        return len(self._checksums)

    def layer(self, index: int) -> Encoded:
        """One layer as stored; copied out of the mapping, so that what is checked is what is used.

        Raises:
            CorruptChunk: when it is not what was written.
        """
        if self._shrunk():
            raise self._corrupt("was cut short while in use")
        try:
            parts = {
                part: _copy(self._file.get_tensor(f"{index}.{part}"))
                for part in PARTS[self.header.storage]
            }
        except SafetensorError as error:
            raise self._corrupt(f"has an unreadable layer {index}: {error}") from error
        if _checksum(parts) != self._checksums[index]:
            raise self._corrupt(f"fails the checksum of layer {index}")
        dtype = KEPT_AS.get(self.header.storage, DTYPES[self.header.dtype])
        for part in (parts["keys"], parts["values"]):
            if part.dtype != dtype or part.dim() != 4 or part.shape[2] != self.header.tokens:
                raise self._corrupt(f"holds {part.dtype} of shape {tuple(part.shape)}")
        return parts

    def _shrunk(self) -> bool:
        """Whether the mapped file was cut short; reading past its end would kill the process."""
        try:
            now = os.stat(self._path)
        except FileNotFoundError:  # deleted: what is mapped stays readable
            return False
        return now.st_ino == self._stat.st_ino and now.st_size != self._stat.st_size
