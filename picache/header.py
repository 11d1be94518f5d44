"""What a compiled chunk is, beside its tensors, and the key made of that."""

import hashlib
import json
from array import array
from dataclasses import asdict, dataclass

import torch

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
"""Names of the dtypes that keys and values may have."""

STORAGES = ("exact", "int8", "fp8")
"""How a store may keep keys and values; see `picache.store.quantize`."""


@dataclass(frozen=True)
class Header:
    """Everything that makes two compilations of the same token ids differ.

    Attributes:
        model: class name of the model.
        fingerprint: hash of its weights and configuration.
        revision: of the weights: the commit on the Hub that transformers recorded when it loaded
            them; empty where it recorded none, as for a local folder.
        dtype: of keys and values, a name of `DTYPES`.
        rope: the rotation the keys were written with, as text.
        sinks: what the chunk was compiled behind: the `DummySinks` or `SharedPrefix`, as text;
            empty for nothing but its own BOS, whether a prompt keeps that or not.
        namespace: the tenant; chunks of two namespaces are never shared.
        storage: how the store keeps the tensors, one of `STORAGES`; what is not kept exactly has
            keys of its own and never passes for exact.
        tokens: of the chunk, as compiled.
        compile_seconds: what compiling took; for eviction, no part of the identity.
    """

    model: str = ""
    fingerprint: str = ""
    revision: str = ""
    dtype: str = ""
    rope: str = ""
    sinks: str = ""
    namespace: str = ""
    storage: str = "exact"
    tokens: int = 0
    compile_seconds: float | None = None


def chunk_key(ids: tuple[int, ...], header: Header) -> str:
    """SHA-256 over the token ids and every field of the header but `compile_seconds`."""
    identity = asdict(header)
    del identity["compile_seconds"]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    digest.update(array("q", ids).tobytes())
    return digest.hexdigest()
