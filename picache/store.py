"""Where compiled chunks live: in memory, bounded in bytes, least recently used leaves first."""

from collections import OrderedDict

from picache.chunk import KV
from picache.errors import PICacheError


def kv_bytes(kv: list[KV]) -> int:
    """Bytes of the tensors of one chunk, all layers."""
    return sum(tensor.nbytes for layer in kv for tensor in layer)


class ChunkStore:
    """KV of compiled chunks by content key, on the device they were compiled on.

    One store may serve several models: keys hold the model's fingerprint.

    Args:
        device_bytes: most bytes of keys and values to hold; None for no bound.

    Raises:
        PICacheError: when `device_bytes` is not positive.
    """

    def __init__(self, device_bytes: int | None = None) -> None:
        if device_bytes is not None and device_bytes <= 0:
            raise PICacheError(
                f"device_bytes must be positive, got {device_bytes}: "
                "leave it out for a store without a bound"
            )
        self.device_bytes = device_bytes
        self.nbytes = 0
        self.hits = self.misses = self.evictions = 0
        self._entries: OrderedDict[str, list[KV]] = OrderedDict()

    def get(self, key: str) -> list[KV] | None:
        """The KV under `key`, now the most recently used, or None."""
        kv = self._entries.get(key)
        if kv is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return kv

    def put(self, key: str, kv: list[KV]) -> None:
        """Store a chunk, evicting the least recently used ones until it fits.

        Raises:
            PICacheError: when the chunk alone is larger than the store; the store is unchanged.
        """
        nbytes = kv_bytes(kv)
        if self.device_bytes is not None and nbytes > self.device_bytes:
            raise PICacheError(
                f"a chunk of {nbytes:,} bytes does not fit a store of {self.device_bytes:,} "
                "bytes: raise device_bytes or split the document"
            )
        if key in self._entries:
            self.nbytes -= kv_bytes(self._entries.pop(key))
        while self.device_bytes is not None and self.nbytes + nbytes > self.device_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.nbytes -= kv_bytes(evicted)
            self.evictions += 1
        self._entries[key] = kv
        self.nbytes += nbytes

    def clear(self) -> None:
        """Drop every chunk; the counters stay."""
        self._entries.clear()
        self.nbytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        bound = "no bound" if self.device_bytes is None else f"of {self.device_bytes:,}"
        return (
            f"ChunkStore({len(self)} chunks, {self.nbytes:,} bytes ({bound}), {self.hits} hits, "
            f"{self.misses} misses, {self.evictions} evictions)"
        )
