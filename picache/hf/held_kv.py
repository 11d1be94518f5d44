"""The keys and values of a linked batch, which all caches made of one prompt share."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from picache.chunk import KV


class Appending(Protocol):
    """Memory in which a cache appends tokens behind a prompt.

    Attributes:
        layers: of each layer, ``[batch, kv_heads, places, head_dim]``; the prompt's tokens first.
    """

    layers: list[KV]

    @property
    def in_arena(self) -> bool:
        """Whether the places are those of an arena, and the rows those of the prompt."""
        ...

    def move_out(self) -> None:
        """Copy everything to memory of its own."""
        ...


class HeldKV:
    """Keys and values of a batch.

    Args:
        layers: of each layer, ``[batch, kv_heads, places, head_dim]``.
        tokens: how many of the places are taken, padding included.

    Attributes:
        tokens: as handed in.
    """

    def __init__(self, layers: list[KV], tokens: int) -> None:
        self._layers, self.tokens = layers, tokens

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> KV:
        """Keys and values of a layer, ``[batch, kv_heads, tokens, head_dim]``; views."""
        keys, values = self._layers[layer]
        return keys[:, :, : self.tokens], values[:, :, : self.tokens]

    def __iter__(self) -> Iterator[KV]:
        return (self[layer] for layer in range(len(self)))

    def on(self, device: torch.device) -> "HeldKV":
        """The same on a device, copied where they are on another."""
        if self[0][0].device == device:
            return self
        return HeldKV([(keys.to(device), values.to(device)) for keys, values in self], self.tokens)

    @property
    def lent(self) -> bool:
        """Whether they lie in an arena, where others may write one day."""
        return False

    @property
    def fixed(self) -> bool:
        """Whether caches of this prompt decode in memory of fixed size."""
        return False

    def room(self, memory: Appending) -> list[KV] | None:
        """All places, for one that appends behind the tokens; None where it must not."""
        return None

    @property
    def arena_lengths(self) -> list[Tensor] | None:
        """Numbers on the device that who appends in place counts tokens in; None elsewhere."""
        return None


class FirstTokens(HeldKV):
    """The first tokens of a batch that another holds, who may go on being lent.

    Args:
        held: the whole batch.
        tokens: how many of its places, padding included.
    """

    def __init__(self, held: HeldKV, tokens: int) -> None:
        super().__init__([], tokens)
        self._whole = held

    @override
    def __len__(self) -> int:
        return len(self._whole)

    @override
    def __getitem__(self, layer: int) -> KV:
        keys, values = self._whole[layer]
        return keys[:, :, : self.tokens], values[:, :, : self.tokens]

    @override
    def on(self, device: torch.device) -> HeldKV:
        return FirstTokens(self._whole.on(device), self.tokens)

    @property
    @override
    def lent(self) -> bool:
        return self._whole.lent
