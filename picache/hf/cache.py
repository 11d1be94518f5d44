"""The caches that forwards of this package write into: a prefill, and a sparse pass."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from picache.chunk import KV
from picache.hf.ambient import refuse_autocast, refuse_other_dtype
from picache.hf.sparse_pass import KVByLayer, SparsePass


class PrefillCache(DynamicCache):
    """The cache that a chunk is prefilled into; it refuses a forward under autocast.

    Without a configuration it keeps every key, those of sliding-window layers too.
    """

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values; PICacheError when autocast is on inside the forward."""
        refuse_autocast(key_states.device.type)
        return super().update(key_states, value_states, *args, **kwargs)


class ScatterLayer(DynamicLayer):
    """One layer of the cache of a sparse pass: it holds the whole prompt from the beginning.

    Where an ordinary cache appends, this one writes the keys and values of the recomputed tokens at
    their positions and gives back those of the whole prompt.

    Args:
        kv: keys and values of the whole prompt, layer by layer; a layer is asked for when the pass
            reaches it.
        index: which layer this is.
        length: tokens of the whole prompt.
        running: the pass.
    """

    def __init__(self, kv: KVByLayer, index: int, length: int, running: SparsePass) -> None:
        super().__init__()
        self.is_initialized = True
        self.kv, self.index, self.length, self.running = kv, index, length, running

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> KV:
        """Write the recomputed tokens' keys and values; return those of the whole prompt."""
        refuse_autocast(key_states.device.type)
        keys, values = self.kv[self.index]
        refuse_other_dtype((key_states, value_states), (keys, values), "the compiled chunks hold")
        chosen = self.running.replaced((key_states, value_states), (keys, values))
        positions, fresh = self.running.positions, (key_states, value_states)
        if chosen is not None:
            positions, fresh = positions[chosen], (fresh[0][:, :, chosen], fresh[1][:, :, chosen])
        keys.index_copy_(2, positions, fresh[0])
        values.index_copy_(2, positions, fresh[1])
        return keys, values

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    @override
    def get_seq_length(self) -> int:
        return self.length


class TailLayer(ScatterLayer):
    """One layer of the cache of a pass over the prompt's last tokens by the model's own attention.

    To the model it holds what stands before them, as in a prefill in parts.
    """

    @override
    def get_seq_length(self) -> int:
        return int(self.running.positions_on_cpu[0])


def held_by(cache: DynamicCache) -> list[KV]:
    """Keys and values of every layer of a cache that holds some."""
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return [(x.keys, x.values) for x in layers if x.keys is not None and x.values is not None]
