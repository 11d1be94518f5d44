"""A chunk of text as token ids, and the key its compiled KV is stored under."""

import hashlib
import json
from array import array
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

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


KV = tuple[Tensor, Tensor]  # keys and values of one layer, each [1, kv_heads, tokens, head_dim]


@dataclass(frozen=True)
class Form:
    """A chunk exactly as prefilled; its first `skip` tokens, the sinks, stay out of the prompt.

    One text has several forms: behind its own BOS, behind dummies, behind a shared prefix, or as
    the first chunk of a prompt, behind nothing.

    Attributes:
        ids: the token ids that are prefilled together, the sinks included.
        skip: how many of the first ids are sinks (a BOS, dummies or a shared prefix), which absorb
            attention while the chunk is compiled and whose KV is left out of the prompt.
        key: the content key of `ids` and `header`, under which a store keeps the KV.
        header: what else the KV depends on.
        dropped: ids that the tokenizer added to the text, or a BOS that its ids began with, and
            that the prompt has not.
    """

    ids: tuple[int, ...]
    skip: int
    key: str
    header: Header
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A handle on a compiled chunk; the KV itself lives in the store, under `key`.

    The ids stay with the handle, so that a chunk the store has evicted is compiled again when it
    is linked (the report counts it as a miss).

    Attributes:
        key: content key: token ids as compiled, and everything in a `picache.chunk.Header`.
        ids: the token ids of the text, a leading BOS included.
        nbytes: bytes of the compiled keys and values.
        lead: how many of the ids the tokenizer put in front of the text, such as a BOS; they are
            the chunk's own sink, and left out where it stands in the middle of a prompt.
        dropped: ids that the tokenizer added and no prompt has: an EOS behind the text, or a BOS in
            front of a text that begins with one already.
    """

    key: str
    ids: tuple[int, ...]
    nbytes: int
    lead: int = 0
    dropped: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the text, a leading BOS included."""
        return len(self.ids)

    def __len__(self) -> int:
        return self.num_tokens

    def __repr__(self) -> str:
        return f"Chunk({self.num_tokens} tokens, {self.nbytes:,} bytes, key={self.key[:12]})"
