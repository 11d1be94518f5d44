"""Memory of fixed size, handed on from a cache that is gone to the next one of its model.

A CUDA graph reads at the addresses that it was recorded with. With memory of its own, each cache
would have the same step recorded anew; torch looks through all records before every step, and
after 128 of them runs without a graph.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet, finalize, ref

import torch
from transformers import PreTrainedModel

from sparsity.retention.all_layers import AllLayers
from sparsity.retention.clock import Clock
from sparsity.retention.layer import LayerRetention
from sparsity.retention.page_pool import PagePool


@dataclass(frozen=True)
class _Left:
    """What a cache has left: the pool of each managed layer, for which kind, and the clock."""

    pools: dict[int, tuple[object, PagePool]]
    clock: Clock

    def pools_for(self, state: AllLayers, batch: int, dtype: torch.dtype) -> Iterator[PagePool]:
        """The pool of each layer of `state`, as far as it may serve."""
        for layer, retention in state.retentions.items():
            kind, pool = self.pools.get(layer, (None, None))
            if pool is None or kind != _kind(retention):
                return
            if pool.keys.shape[0] == batch and pool.keys.dtype == dtype:
                yield pool


_SERVED: WeakSet[PreTrainedModel] = WeakSet()  # decoders that are attached
_LEFT: WeakKeyDictionary[PreTrainedModel, _Left] = WeakKeyDictionary()


def leave_to_the_next(cache: object, decoder: PreTrainedModel, state: AllLayers) -> None:
    """Once `cache` is gone, keep its memory for the next cache of `decoder`, while it is attached.

    Args:
        cache: whose end is waited for.
        decoder: of its model.
        state: of the cache; must not refer to it.
    """
    _SERVED.add(decoder)
    finalize(cache, _leave, ref(decoder), state).atexit = False


def _leave(decoder: "ref[PreTrainedModel]", state: AllLayers) -> None:
    model, clock = decoder(), state.clock or state.spare_clock
    if model not in _SERVED or clock is None or not state.recorded:
        return
    assert model is not None
    pools = {
        layer: (_kind(retention), retention.fixed)
        for layer, retention in state.retentions.items()
        if retention.fixed is not None
    }
    _LEFT[model] = _Left(pools, clock)


def take(decoder: PreTrainedModel, state: AllLayers, batch: int, dtype: torch.dtype) -> None:
    """Give a cache that holds nothing yet the memory that was left, or free it if it does not fit.

    Args:
        decoder: of the model.
        state: of the cache.
        batch: rows of its first forward.
        dtype: of its keys and values.
    """
    left = _LEFT.pop(decoder, None)
    if left is None:
        return
    pools = list(left.pools_for(state, batch, dtype))
    if len(pools) == len(state.retentions):
        for retention, pool in zip(state.retentions.values(), pools, strict=True):
            retention.fixed = pool
        state.spare_clock, state.recorded = left.clock, True


def drop(decoder: PreTrainedModel) -> None:
    """Free the memory that was left, and keep none any more; for a model that is detached."""
    _SERVED.discard(decoder)
    _LEFT.pop(decoder, None)


def left_bytes(decoder: PreTrainedModel) -> int:
    """Bytes of the memory that was left."""
    left = _LEFT.get(decoder)
    pools = [] if left is None else [pool for _, pool in left.pools.values()]
    return sum(tensor.nbytes for pool in pools for tensor in pool.tensors().values())


def _kind(retention: LayerRetention) -> object:
    """What the shape of a pool follows from, but for the batch and the dtype."""
    return repr(retention.policy), type(retention.policy), retention.places
