"""A chunk of text: its token ids, its form when prefilled, and the key its KV is stored under."""

import hashlib
import json
from array import array
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
"""The dtypes that keys and values may have, by name."""

STORAGES = ("exact", "int8", "fp8")
"""How a store may keep keys and values: exactly or in 8 bits; see `picache.store.quantize`."""


@dataclass(frozen=True)
class Header:
    """What the keys and values of a chunk depend on besides its token ids.

    Attributes:
        model: class name of the model.
        fingerprint: hash of its weights and configuration.
        revision: commit on the Hub that transformers recorded when it loaded the weights; empty
            where it recorded none, as for a local folder.
        dtype: of keys and values, a name in `DTYPES`.
        rope: the rotations of the layers, as text.
        sinks: the `DummySinks` or `SharedPrefix` that the chunk was compiled behind, as text;
            empty for nothing but its own BOS, whether a prompt keeps the BOS or not.
        namespace: the tenant; chunks of two namespaces are never shared.
        storage: how the store keeps the tensors, one of `STORAGES`. Chunks that are not kept
            exactly have keys of their own and are never taken for exact ones.
        tokens: how many tokens were prefilled, sinks included.
        compile_seconds: how long compiling took, in seconds; counts in eviction by cost, and is no
            part of the key.
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
    """The key of a chunk: SHA-256 over its token ids and the header, `compile_seconds` excepted."""
    identity = {name: value for name, value in vars(header).items() if name != "compile_seconds"}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    digest.update(array("q", ids).tobytes())
    return digest.hexdigest()


KV = tuple[Tensor, Tensor]
"""Keys and values of one layer, each ``[1, kv_heads, tokens, head_dim]``."""


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
        dropped: ids of special tokens that came with the text and are not in the prompt.
    """

    ids: tuple[int, ...]
    skip: int
    key: str
    header: Header
    dropped: tuple[int, ...] = ()

    @cached_property
    def prompt_ids(self) -> Tensor:
        """The token ids that stand in the prompt, int64 ``[tokens]``; not to be written to."""
        return torch.tensor(self.ids[self.skip :], dtype=torch.int64)


@dataclass(frozen=True)
class Chunk:
    """A compiled chunk, as `PIC.compile` returns it; its KV is in the store, under `key`.

    The chunk keeps its token ids, so that one which the store has evicted is compiled again when it
    is linked; the report counts it as a miss.

    Attributes:
        key: the key of its KV in the store, made of its ids and a `picache.chunk.Header`.
        ids: token ids of the text, a leading BOS included.
        nbytes: bytes of its keys and values, all layers.
        lead: how many of the ids are special tokens in front of the text, such as a BOS. They are
            the chunk's own sink, and are left out where it does not stand first in a prompt.
        dropped: ids of special tokens that the tokenizer added and that no prompt contains: an EOS
            behind the text, or a second BOS in front of a text that begins with one.
        ends: how its text begins and ends, to look at where texts meet (`picache.seams`); None
            where it was compiled from token ids.
    """

    key: str
    ids: tuple[int, ...]
    nbytes: int
    lead: int = 0
    dropped: tuple[int, ...] = ()
    ends: tuple[str, str] | None = field(default=None, compare=False)
    _forms: dict[Hashable, Form] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        """What is pickled and copied leaves out the forms, which are made anew."""
        return Chunk, (self.key, self.ids, self.nbytes, self.lead, self.dropped, self.ends)

    def form(self, of: Hashable, make: Callable[[], Form]) -> Form:
        """The form that `make` gives, made once for each `of`: keys take long to hash."""
        found = self._forms.get(of)
        if found is None:
            found = self._forms[of] = make()
        return found

    @property
    def num_tokens(self) -> int:
        """Tokens of the text, a leading BOS included."""
        return len(self.ids)

    def __len__(self) -> int:
        return self.num_tokens

    def __repr__(self) -> str:
        return f"Chunk({self.num_tokens} tokens, {self.nbytes:,} bytes, key={self.key[:12]})"
