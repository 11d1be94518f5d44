"""One memory for the keys and values of the prompts that a model links, allocated once."""

import threading
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from typing_extensions import override

from picache.chunk import KV
from picache.hf.attention_switch import AttentionSwitch
from picache.hf.held_kv import Appending, HeldKV

# Attention functions of transformers that take a mask of all places of a cache of fixed size.
_MASKED = ("sdpa", "eager")


class Arena:
    """Keys and values of every layer, for one batch of prompts after the other.

    The addresses never change, so that a CUDA graph that was captured over them serves every
    prompt. The memory is not bound to a batch: it is divided among as many prompts as are asked
    for. It begins as zeros.

    Args:
        one_token: keys and values of one token in each layer, ``[1, kv_heads, 1, head_dim]``.
        tokens: how many tokens, of all prompts of a batch together, it has places for.

    Attributes:
        tokens: as handed in.
        lengths: for each layer a number on its device, int64, which a cache that decodes in the
            arena counts its tokens in.
        turn: held by a thread that takes tensors of it, or takes it back.
    """

    def __init__(self, one_token: list[KV], tokens: int) -> None:
        self.tokens = tokens
        self._one_token = one_token
        # A tensor made in inference mode could be written to in that mode alone.
        with torch.inference_mode(mode=False):
            self._memory = [
                (keys.new_zeros(tokens * keys.numel()), values.new_zeros(tokens * values.numel()))
                for keys, values in one_token
            ]
            self.lengths = [
                torch.zeros((), dtype=torch.int64, device=keys.device) for keys, _ in one_token
            ]
        self._places: dict[int, list[KV]] = {}
        self.turn = threading.RLock()
        self._tenant: ref[LentKV] | None = None
        self._lent: list[StorageWeakRef] = []

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(tensor.nbytes for layer in self._memory for tensor in layer)

    def places(self, batch: int) -> list[KV]:
        """The memory divided among the prompts of a batch, layer by layer.

        Args:
            batch: how many prompts.

        Returns:
            Keys and values ``[batch, kv_heads, tokens // batch, head_dim]`` of each layer; views.
        """
        if batch not in self._places:
            self._places[batch] = [
                (self._divided(memory[0], one[0], batch), self._divided(memory[1], one[1], batch))
                for memory, one in zip(self._memory, self._one_token, strict=True)
            ]
        return self._places[batch]

    def put(self, batch: int, row: int, kv: list[KV]) -> None:
        """Put a prompt, ``[1, kv_heads, tokens, head_dim]`` of each layer, in a row of a batch."""
        for places, tensors in zip(self.places(batch), kv, strict=True):
            for place, tensor in zip(places, tensors, strict=True):
                place[row : row + 1, :, : tensor.shape[2]] = tensor

    def align(self, lengths: list[int]) -> None:
        """Move the prompts of a batch so that all end where the longest does; zeros in front.

        Args:
            lengths: tokens of each prompt.
        """
        width = max(lengths)
        if min(lengths) == width:
            return
        device = self._memory[0][0].device
        padding = width - torch.tensor(lengths, device=device)
        source = (torch.arange(width, device=device) - padding[:, None])[:, None, :, None]
        for layer in self.places(len(lengths)):
            for tensor in layer:
                _, heads, _, dim = tensor.shape
                taken = tensor[:, :, :width]
                index = source.clamp_min(0).expand(-1, heads, -1, dim)
                taken.copy_(taken.gather(2, index).masked_fill_(source < 0, 0))

    def lend(self, batch: int, tokens: int, attention: AttentionSwitch) -> HeldKV:
        """The keys and values that stand in the first places of each prompt, until `vacate`.

        Args:
            batch: how many prompts.
            tokens: of each.
            attention: of the model.
        """
        held = LentKV(self, batch, tokens, attention)
        self._tenant = ref(held)
        return held

    def lent(self, batch: int, layer: int) -> KV:
        """The places of a layer, for somebody who may keep the tensors; see `vacate`.

        Args:
            batch: how many prompts.
            layer: index of the layer.
        """
        # Other storages on the same memory: as long as a tensor on one of them lives, it is read.
        with torch.inference_mode(mode=False):
            keys, values = map(torch.from_dlpack, self._memory[layer])
        self._lent += [StorageWeakRef(keys.untyped_storage())]
        self._lent += [StorageWeakRef(values.untyped_storage())]
        one = self._one_token[layer]
        return self._divided(keys, one[0], batch), self._divided(values, one[1], batch)

    def vacate(self) -> bool:
        """Move what was lent and is still in use to memory of its own.

        Returns:
            Whether the memory is free. It is not where somebody has taken tensors of it for their
            own, such as a cache that goes on from a linked one.
        """
        with self.turn:
            if self._tenant is not None and (tenant := self._tenant()) is not None:
                tenant.move_out()
            self._tenant = None
            self._lent = [storage for storage in self._lent if not storage.expired()]
            return not self._lent

    def _divided(self, memory: Tensor, one: Tensor, batch: int) -> Tensor:
        _, heads, _, dim = one.shape
        each = self.tokens // batch
        return memory[: batch * heads * each * dim].view(batch, heads, each, dim)


class LentKV(HeldKV):
    """Keys and values of a batch that lie in an arena, until its next batch is linked.

    Args:
        arena: where they lie.
        batch: how many prompts.
        tokens: of each.
        attention: of the model.
    """

    def __init__(self, arena: Arena, batch: int, tokens: int, attention: AttentionSwitch) -> None:
        super().__init__([], tokens)
        self._arena: Arena | None = arena
        self._turn = arena.turn
        self._count, self._batch, self._attention = len(arena.lengths), batch, attention
        self._views: dict[int, KV] = {}
        self._appending: ref[Appending] | None = None

    @override
    def __len__(self) -> int:
        return self._count

    @override
    def __getitem__(self, layer: int) -> KV:
        with self._turn:
            if self._arena is None:
                return super().__getitem__(layer)
            if layer not in self._views:  # most are never asked for
                self._views[layer] = self._arena.lent(self._batch, layer)
            keys, values = self._views[layer]
            # A forward that records gradients may have appended behind them.
            return keys[:, :, : self.tokens].detach(), values[:, :, : self.tokens].detach()

    @property
    @override
    def lent(self) -> bool:
        return self._arena is not None

    @property
    @override
    def fixed(self) -> bool:
        return self._attention.own in _MASKED

    @override
    def room(self, memory: Appending) -> list[KV] | None:
        with self._turn:
            taken = self._appending is not None and self._appending() is not None
            if self._arena is None or taken:
                return None
            self._appending = ref(memory)
            for layer in range(len(self)):
                self[layer]
            return [self._views[layer] for layer in range(len(self))]

    @property
    @override
    def arena_lengths(self) -> list[Tensor] | None:
        return None if self._arena is None else self._arena.lengths

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or a file, holds the tokens alone, and not the arena."""
        return HeldKV, ([(keys.clone(), values.clone()) for keys, values in self], self.tokens)

    def move_out(self) -> None:
        """Copy the tokens, and what a cache has appended in place, to memory of their own."""
        if self._arena is None:
            return
        memory = None if self._appending is None else self._appending()
        if memory is not None and memory.in_arena:
            memory.move_out()
            self._layers = memory.layers
        else:
            self._layers = [(keys.clone(), values.clone()) for keys, values in self]
        self._arena, self._appending = None, None
        self._views.clear()
