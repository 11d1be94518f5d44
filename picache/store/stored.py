"""A chunk as a store takes it in, checked, and as it gives it out again, layer by layer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from picache.chunk import DTYPES, KV, Header
from picache.errors import PICacheError
from picache.kernels.placing import Resident
from picache.store.quantize import Encoded, decode
from picache.store.together import Packed, moved


def human(nbytes: float) -> str:
    """A number of bytes as text with a unit: 1536 is "1.5 KiB"."""
    if nbytes < 1024:
        return f"{nbytes:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1024:,.1f} TiB"


class StoredChunk:
    """One chunk of a store, to be read layer by layer; a layer is loaded when it is asked for.

    Attributes:
        key: the key it is stored under.
        header: what its KV depends on.
        nbytes: bytes it takes in the store, all layers.
        tier: where it is: "device", "host" or "disk".
        num_layers: layers of the model.
        held: its layers as they are stored, where they are in memory; empty for a file.

    Args:
        read: reads layers that follow each other from a file; None where they are held.
    """

    def __init__(
        self,
        key: str,
        header: Header,
        nbytes: int,
        tier: str,
        num_layers: int,
        held: Sequence[Encoded] = (),
        read: Callable[[range], Packed] | None = None,
    ) -> None:
        self.key, self.header, self.nbytes, self.tier = key, header, nbytes, tier
        self.num_layers, self.held = num_layers, held
        self._read = read

    def encoded(self, layers: range) -> Packed | Sequence[Encoded]:
        """These layers as they are stored; raises as `layers` does."""
        if not 0 <= layers.start < layers.stop <= self.num_layers or layers.step != 1:
            raise IndexError(f"layers {[*layers]} of a chunk of {self.num_layers} layers")
        if self._read is None:
            return self.held[layers.start : layers.stop]
        return self._read(layers)

    def layers(self, layers: range, device: torch.device | str | None = None) -> list[KV]:
        """Keys and values of layers that follow each other, ``[1, kv_heads, tokens, head_dim]``.

        They are on the device they were put from, or in host memory, which is page-locked where
        there is a CUDA device. Do not write to them.

        Args:
            layers: one at least.
            device: where to copy them; None to leave them where they are. They are copied as
                stored, so that fewer bytes move where 8 bits are stored. From page-locked memory
                the copy is queued in the current CUDA stream and the call does not wait for it.

        Raises:
            CorruptChunk: when the file does not hold what was written; the store has dropped it.
            IndexError: when there are no such layers.
        """
        parts = moved(self.encoded(layers), device)
        return [decode(layer, DTYPES[self.header.dtype]) for layer in parts]

    def layer(self, index: int, device: torch.device | str | None = None) -> KV:
        """Keys and values of one layer; see `layers`."""
        return self.layers(range(index, index + 1), device)[0]

    def resident(self, device: torch.device) -> Resident | None:
        """All layers as they lie on a device; None where they do not, or in 8 bits."""
        if not self.held or self.header.storage != "exact":
            return None
        return self._resident if self.held[0]["keys"].device == device else None

    @cached_property
    def _resident(self) -> Resident:
        return Resident.of(self)

    def load(self) -> list[KV]:
        """Keys and values of every layer; raises as `layer` does."""
        return list(self)

    def __iter__(self) -> Iterator[KV]:
        return map(self.layer, range(self.num_layers))

    def __len__(self) -> int:
        return self.num_layers

    def __repr__(self) -> str:
        return (
            f"StoredChunk({self.header.tokens} tokens, {self.num_layers} layers, "
            f"{human(self.nbytes)} on {self.tier}, key={self.key[:12]})"
        )


def check_kv(key: str, kv: list[KV], header: Header | None, namespace: str, storage: str) -> Header:
    """Check the tensors of a chunk before it is stored, and return its header.

    Args:
        key: of the chunk, for errors.
        kv: keys and values, layer by layer.
        header: as given by the caller; None to make one of what the tensors show.
        namespace: of the store.
        storage: of the store.

    Raises:
        PICacheError: when a tensor is not finite, when shapes or dtypes do not go together, or when
            the header contradicts the tensors or the store.
    """
    if not kv:
        raise PICacheError(f"chunk {key} has no layers: give keys and values of each layer")
    first = kv[0][0]
    if first.dim() != 4 or first.shape[0] != 1 or 0 in first.shape:
        raise PICacheError(
            f"chunk {key} has keys of shape {tuple(first.shape)} in layer 0: expected "
            "[1, kv_heads, tokens, head_dim], none of them 0"
        )
    dtype = str(first.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise PICacheError(f"chunk {key} is of dtype {dtype}: expected one of {', '.join(DTYPES)}")
    tokens = first.shape[2]
    for index, layer in enumerate(kv):
        for what, tensor in zip(("keys", "values"), layer, strict=True):
            if tensor.dim() != 4 or tensor.shape[0] != 1 or tensor.shape[2] != tokens:
                raise PICacheError(
                    f"chunk {key} has {what} of shape {tuple(tensor.shape)} in layer {index}: "
                    f"expected [1, kv_heads, {tokens}, head_dim], the tokens of layer 0"
                )
            if tensor.dtype != first.dtype or 0 in tensor.shape:
                raise PICacheError(
                    f"chunk {key} has {what} of {tensor.dtype} and shape {tuple(tensor.shape)} in "
                    f"layer {index}: expected {first.dtype} as in layer 0, and no size of 0"
                )
    # The extremes are NaN if any element is; one pass, 25 times faster than isfinite on a CPU.
    extremes = [torch.stack(torch.aminmax(t)).to(first.device) for layer in kv for t in layer]
    finite = torch.stack(extremes).isfinite().all(1).tolist()
    if not all(finite):  # one transfer from the device for all layers
        index, which = divmod(finite.index(False), 2)
        bad = kv[index][which]
        raise PICacheError(
            f"chunk {key} has {bad[~bad.isfinite()][0].item()} in the {('keys', 'values')[which]} "
            f"of layer {index}: the model overflowed or its weights are broken; it is not stored"
        )
    if header is None:
        return Header(dtype=dtype, namespace=namespace, storage=storage, tokens=tokens)
    seen = replace(header, dtype=dtype, namespace=namespace, storage=storage, tokens=tokens)
    for name in ("dtype", "namespace", "storage", "tokens"):
        if getattr(header, name) != getattr(seen, name):
            raise PICacheError(
                f"the header of chunk {key} says {name}={getattr(header, name)!r}, the store and "
                f"the tensors {getattr(seen, name)!r}: make the header from them"
            )
    return header
