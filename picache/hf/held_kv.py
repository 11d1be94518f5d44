"""The keys and values of a linked batch, which all caches made of one prompt share."""

from collections.abc import Iterator

from picache.chunk import KV


class HeldKV:
    """Keys and values of a batch, in memory of their own, or in an arena until its next batch.

    Args:
        layers: of each layer, ``[batch, kv_heads, places, head_dim]``.
        tokens: how many of the places are taken, padding included.
        lent: whether the memory is an arena's.
    """

    def __init__(self, layers: list[KV], tokens: int, lent: bool = False) -> None:
        self._layers, self._tokens, self._lent = layers, tokens, lent

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> KV:
        """Keys and values of a layer, ``[batch, kv_heads, tokens, head_dim]``; views."""
        keys, values = self._layers[layer]
        return keys[:, :, : self._tokens], values[:, :, : self._tokens]

    def __iter__(self) -> Iterator[KV]:
        return (self[layer] for layer in range(len(self)))

    def move_out(self) -> None:
        """Copy them to memory of their own, where they lie in an arena."""
        if self._lent:
            self._layers = [(keys.clone(), values.clone()) for keys, values in self]
            self._lent = False
