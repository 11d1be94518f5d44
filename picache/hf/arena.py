"""One memory for the keys and values of the prompts that a model links, allocated once."""

from itertools import accumulate
from weakref import ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from picache.chunk import KV
from picache.hf.held_kv import HeldKV

_ALIGNED = 256  # bytes, as the addresses that the allocator of a CUDA device gives


class Arena:
    """Keys and values of every layer, for one batch of prompts after the other.

    The addresses never change, so that a CUDA graph that was captured over them serves every
    prompt. The memory is not bound to a batch: it is divided among as many prompts as are asked
    for. It begins as zeros.

    Args:
        one_token: keys and values of one token in each layer, ``[1, kv_heads, 1, head_dim]``, all
            on one device.
        tokens: how many tokens, of all prompts of a batch together, it has places for.

    Attributes:
        tokens: as handed in.
    """

    def __init__(self, one_token: list[KV], tokens: int) -> None:
        self.tokens = tokens
        self._one_token = one_token
        sizes = [
            -(-tokens * tensor.nbytes // _ALIGNED) * _ALIGNED
            for layer in one_token
            for tensor in layer
        ]
        self._starts = [0, *accumulate(sizes)]
        # A tensor made in inference mode could be written to in that mode alone.
        with torch.inference_mode(mode=False):
            device = one_token[0][0].device
            self._memory = torch.zeros(self._starts[-1], dtype=torch.uint8, device=device)
        self._tenant: ref[HeldKV] | None = None
        self._lent: StorageWeakRef | None = None

    def places(self, batch: int) -> list[KV]:
        """The memory divided among the prompts of a batch, layer by layer.

        Args:
            batch: how many prompts.

        Returns:
            Keys and values ``[batch, kv_heads, tokens // batch, head_dim]`` of each layer; views.
        """
        return self._divided(self._memory, batch)

    def lend(self, batch: int, tokens: int) -> HeldKV:
        """The keys and values that stand in the first places of each prompt, until `vacate`.

        Args:
            batch: how many prompts.
            tokens: of each.
        """
        # Another storage on the same memory: as long as any tensor on it lives, it is being read.
        alias = torch.from_dlpack(self._memory)
        held = HeldKV(self._divided(alias, batch), tokens, lent=True)
        self._tenant, self._lent = ref(held), StorageWeakRef(alias.untyped_storage())
        return held

    def vacate(self) -> bool:
        """Move what was lent and is still in use to memory of its own.

        Returns:
            Whether the memory is free. It is not where somebody has taken tensors of it for their
            own, such as a cache that goes on from a linked one.
        """
        if self._tenant is not None and (tenant := self._tenant()) is not None:
            tenant.move_out()
        return self._lent is None or self._lent.expired()

    def _divided(self, memory: Tensor, batch: int) -> list[KV]:
        each, starts = self.tokens // batch, iter(self._starts)

        def of(one: Tensor) -> Tensor:
            _, heads, _, dim = one.shape
            start, nbytes = next(starts), batch * each * one.nbytes
            flat = memory[start : start + nbytes].view(one.dtype)
            return flat.view(batch, heads, each, dim)

        return [(of(keys), of(values)) for keys, values in self._one_token]
