"""Memory of fixed size that a linked prompt is decoded in, so that a step can be compiled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from picache.chunk import KV
from picache.hf.held_kv import HeldKV

# A tensor that is made in inference mode could be written to in that mode alone.
_writable = torch.inference_mode(mode=False)
_ROOM = 256  # tokens that there are places for at least when memory is made or made larger


class FixedMemory:
    """The places that one cache of a prompt decodes in.

    They are those behind the prompt itself, where it lies in an arena and no other cache appends
    there, or a copy with room. A power of two of them is shown, or as many as there are, so that
    few sizes occur; where they do not suffice more are shown, or all is copied to more room.

    Args:
        held: the prompt.

    Attributes:
        layers: of each layer the keys and values in the places shown, ``[batch, kv_heads, places,
            head_dim]``; zeros where no token stands.
        lengths: of each layer the tokens it holds, a number on the device, int64.
    """

    def __init__(self, held: HeldKV) -> None:
        self.layers: list[KV] = []
        self.lengths: list[Tensor] = []
        self._held: HeldKV | None = held
        self._places: list[KV] | None = None
        self._most = held.tokens  # at most so many tokens: the device is not asked

    @property
    def opened(self) -> bool:
        """Whether there are places; before, nothing is copied."""
        return self._held is None

    @_writable
    def open(self) -> None:
        """Take the places behind the prompt, or copy it."""
        if self._held is None:
            return
        held, self._held = self._held, None
        self._places = held.room(self)
        lengths = None if self._places is None else held.arena_lengths
        self.lengths = lengths or [
            torch.zeros((), dtype=torch.int64, device=keys.device) for keys, _ in held
        ]
        for length in self.lengths:
            length.fill_(held.tokens)
        self._show(list(held), held.tokens)
        self._mark(self.lengths)

    @property
    def in_arena(self) -> bool:
        """Whether the places are those of an arena, and the rows those of the prompt."""
        return self._places is not None

    @property
    def places(self) -> int:
        """How many places are shown."""
        return self.layers[0][0].shape[2]

    @_writable
    def make_room(self, new: int) -> None:
        """See to it that a forward of `new` tokens finds places; called before its layers run."""
        self.open()
        self._most += new
        if self._most <= self.places:
            return
        tokens = int(self.lengths[0])  # waits for the device
        self._most = tokens + new
        if self._most > self.places:
            held = [(keys[:, :, :tokens], values[:, :, :tokens]) for keys, values in self.layers]
            self._show(held, tokens, self._most)

    @_writable
    def move_out(self) -> None:
        """Copy everything to memory of its own, in which as many places are shown."""
        self._places = None
        self.layers = [(keys.clone(), values.clone()) for keys, values in self.layers]
        self.lengths = [length.clone() for length in self.lengths]
        self._mark([tensor for layer in self.layers for tensor in layer] + self.lengths)

    @_writable
    def change(self, layer: int, rows: Callable[[Tensor], Tensor]) -> None:
        """Replace a layer's tensors by what is made of them: rows repeated, or in another order."""
        self.open()
        self._places = None  # which hold the rows as they were
        keys, values = self.layers[layer]
        self.layers[layer] = rows(keys), rows(values)
        self._mark(list(self.layers[layer]))

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a file, holds the places shown alone, and not the arena."""
        layers = [(keys.clone(), values.clone()) for keys, values in self.layers]
        return self.__dict__ | {"layers": layers, "_places": None}

    def _show(self, held: list[KV], tokens: int, needed: int = 0) -> None:
        """Show places for the tokens held and some more."""
        places = 1 << (max(tokens, needed) + _ROOM - 1).bit_length()
        if self._places is not None and self._places[0][0].shape[2] >= max(needed, tokens + 1):
            places = min(places, self._places[0][0].shape[2])
            self.layers = [
                (keys[:, :, :places], values[:, :, :places]) for keys, values in self._places
            ]
            for tensor in (tensor for layer in self.layers for tensor in layer):
                tensor[:, :, tokens:] = 0  # garbage may be NaN, which a mask does not keep out
        else:
            self._places = None
            self.layers = [
                (_with_room(keys, places), _with_room(values, places)) for keys, values in held
            ]
        self._mark([tensor for layer in self.layers for tensor in layer])

    def _mark(self, tensors: list[Tensor]) -> None:
        """Tell torch.compile that the addresses stay, or a CUDA graph would copy the tensors."""
        for tensor in tensors:
            if tensor.is_cuda:
                torch._dynamo.mark_static_address(tensor, guard=False)  # noqa: SLF001 - as transformers does


def _with_room(tensor: Tensor, places: int) -> Tensor:
    """A copy with zeros behind the tokens."""
    batch, heads, tokens, dim = tensor.shape
    roomy = tensor.new_zeros(batch, heads, places, dim)
    roomy[:, :, :tokens] = tensor
    return roomy
