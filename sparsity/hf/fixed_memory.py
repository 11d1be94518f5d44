"""Memory of fixed size, handed on from a cache that is gone to the next one of its model.

A CUDA graph reads at the addresses that it was recorded with. With memory of its own, each cache
would have the same step recorded anew; torch looks through all records before every step, and
after 128 of them runs without a graph.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary, finalize, ref

from transformers import PreTrainedModel

from sparsity.policies.base import Policy
from sparsity.retention.all_layers import AllLayers
from sparsity.retention.clock import Clock
from sparsity.retention.page_pool import PagePool


@dataclass(frozen=True)
class _Left:
    """What a cache has left: of each managed layer its policy, places and pool, and the clock."""

    pools: dict[int, tuple[Policy, int | None, PagePool]]
    clock: Clock


_LEFT: WeakKeyDictionary[PreTrainedModel, _Left] = WeakKeyDictionary()


def leave_to_the_next(cache: object, decoder: PreTrainedModel, state: AllLayers) -> None:
    """Once `cache` is gone, keep its memory for the next cache of `decoder`.

    Args:
        cache: whose end is waited for.
        decoder: of its model.
        state: of the cache; must not refer to it.
    """
    finalize(cache, _leave, ref(decoder), state).atexit = False


def _leave(decoder: "ref[PreTrainedModel]", state: AllLayers) -> None:
    model, clock = decoder(), state.clock
    if model is None or clock is None or not state.compiled:
        return
    pools = {
        layer: (retention.policy, retention.places, retention.fixed)
        for layer, retention in state.retentions.items()
        if retention.fixed is not None
    }
    _LEFT[model] = _Left(pools, clock)


def take(decoder: PreTrainedModel, state: AllLayers) -> None:
    """Give a cache that holds nothing yet the memory that was left, as far as it fits."""
    left = _LEFT.pop(decoder, None)
    if left is None:
        return
    for layer, retention in state.retentions.items():
        policy, places, pool = left.pools.get(layer, (None, None, None))
        if (policy, places) == (retention.policy, retention.places):
            retention.fixed = pool
    state.spare_clock = left.clock


def drop(decoder: PreTrainedModel) -> None:
    """Free the memory that was left."""
    _LEFT.pop(decoder, None)
