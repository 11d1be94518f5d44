"""Which file a chunk is kept in."""

import re

from picache.errors import PICacheError
from picache.store.files import SUFFIX

_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}")


def file_name(key: str) -> str:
    """The file of a key, ``shard/key.safetensors``; PICacheError when the key cannot name one."""
    if not _KEY.fullmatch(key):
        raise PICacheError(
            f"key {key!r} cannot name a file: give 1 to 128 letters, digits, '_' or '-', such "
            "as picache.chunk.chunk_key returns"
        )
    return f"{key[:2]}/{key}{SUFFIX}"


def key_of(name: str) -> str | None:
    """The key of a file, None of a file that is no chunk's."""
    key = name.rpartition("/")[2].removesuffix(SUFFIX)
    return key if _KEY.fullmatch(key) and name == file_name(key) else None
