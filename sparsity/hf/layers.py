"""What stands in a transformers cache for one layer, and how the layers of a cache are built."""

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from typing_extensions import override

from sparsity.errors import SparsityError
from sparsity.policies.base import Policy
from sparsity.policies.full import policy_of_layer
from sparsity.policies.streaming_llm import StreamingLLM
from sparsity.retention.all_layers import AllLayers
from sparsity.retention.batch_rows import BatchRows
from sparsity.retention.layer import LayerRetention, storage_bytes


class RetainedLayer(DynamicLayer):
    """A layer with full attention under a policy; `keys` and `values` are what is held.

    Attributes:
        retention: what the layer holds.
        seen: columns so far, padding included.
        pending: shapes of the keys and values given to `update`, until attention is computed.
        state: of the cache that the layer is part of; None while it is part of none.
        home: the device that an offloaded layer came from; None for a layer that is not offloaded.
    """

    is_croppable = False
    is_compileable = False

    def __init__(self, retention: LayerRetention, seen: int = 0) -> None:
        super().__init__()
        self.retention = retention
        self.seen = seen
        self.state: AllLayers | None = None
        self.pending: tuple[torch.Size, torch.Size] | None = None  # shapes given to `update`
        self.home: torch.device | None = None  # where an offloaded layer belongs
        self.show()

    def show(self) -> None:
        """Point `keys` and `values` at the tensors held."""
        held = self.retention.held
        self.keys, self.values = (None, None) if held is None else held
        self.is_initialized = held is not None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count the new tokens and hand them on; the attention function stores them."""
        self.seen += key_states.shape[-2]
        self.pending = (key_states.shape, value_states.shape)
        return key_states, value_states

    def get_seq_length(self) -> Any:
        """Columns seen, padding included; a tensor while torch.compile traces a step."""
        if self.state is not None and self.state.begun:
            assert self.state.clock is not None
            return self.state.clock.column
        return self._seq_length()

    @torch.compiler.disable
    def _seq_length(self) -> int:
        if self.state is not None and self.state.step is None:
            self.state.catch_up()
            self.seen = self.state.rows.seen
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The sizes as if all tokens were kept: masks are evaluated on columns."""
        if self.state is not None and self.state.begun:
            return query_length, 0  # no mask is made
        return self._seq_length() + query_length, 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused with SparsityError: what was evicted cannot come back."""
        refuse_rollback()

    def activate_past_recording(self) -> None:
        """Refused with SparsityError: what was evicted cannot come back."""
        refuse_rollback()

    def offload(self) -> None:
        """Move all that is held to host memory, what the policy needs included."""
        if self.keys is not None and self.home is None:
            self.home = self.keys.device
            self.retention.map(lambda t: t.to("cpu"))
            self.show()

    def prefetch(self) -> None:
        """Move what was offloaded back to its device."""
        if (home := self.home) is not None:
            self.home = None
            self.retention.map(lambda t: t.to(home))
            self.show()

    @override
    def reset(self) -> None:
        self.retention.clear()
        self.seen, self.home = 0, None
        self.show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of `indices`, in that order."""
        self.retention.map(lambda t: t[indices.to(t.device)])
        self.show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of `beam_idx`, in that order, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, copies next to each other."""
        self.retention.map(lambda t: t.repeat_interleave(repeats, dim=0))
        self.show()


def managed_layers(layers: list[Any]) -> list[RetainedLayer]:
    """Those of the layers that are under a policy."""
    return [layer for layer in layers if isinstance(layer, RetainedLayer)]


def refuse_rollback() -> NoReturn:
    """Raise SparsityError: what was evicted cannot come back."""
    raise SparsityError(
        "a SparseCache cannot go back to an earlier token, so assisted and prompt-lookup decoding "
        "and crop() are refused; generate without an assistant, or use a DynamicCache"
    )


def stock_tokens(layer: Any) -> int:
    """Tokens held by a layer that transformers manages itself."""
    held = getattr(layer, "keys", None)  # linear attention has no keys
    return 0 if held is None or held.dim() < 2 else held.shape[-2]


def layer_bytes(layer: Any) -> int:
    """Bytes of the tensors that a layer of any kind holds."""
    if isinstance(layer, RetainedLayer):
        return layer.retention.num_bytes
    held = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    return storage_bytes(held)


def stock_layers(config: Any, policy: Policy) -> dict[int, Any]:
    """Empty layers of the kinds that transformers manages itself, by their index in the model."""
    layers, _ = build_layers(config, policy, None)
    return {i: layer for i, layer in enumerate(layers) if not isinstance(layer, RetainedLayer)}


def build_layers(
    config: Any, policy: Policy, past: Cache | None, windows: bool = False
) -> tuple[list[Any], BatchRows]:
    """The layers that transformers would use, with full attention put under the policy.

    Args:
        config: of the decoder.
        policy: of the cache.
        past: a cache to go on from; None for an empty one.
        windows: keep sliding windows here, too, by a policy that keeps just the window, so that
            memory can be of fixed size; where `past` does not stand in the way.

    Returns:
        The layers, and the columns that `past` has seen.

    Raises:
        SparsityError: for a layer of a kind that cannot be managed, and a `past` that does not fit.
    """
    layers: list[Any] = DynamicCache(config=config).layers
    earlier: list[Any] = (
        list(past.layers) if past is not None and past.layers else [None] * len(layers)
    )
    if len(earlier) != len(layers):
        raise SparsityError(
            f"past has {len(earlier)} layers and the model {len(layers)}: hand in a cache that "
            "this model filled"
        )
    rows = BatchRows()
    full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    for i, layer in enumerate(layers):
        before: Any = earlier[i]
        if before is not None and not before.is_initialized:
            before = None
        if type(layer) is DynamicLayer:
            held = None if before is None else _held(before, i)
            seen = 0 if held is None else held[0].shape[2]
            own = policy_of_layer(policy, i, full)
            layers[i] = RetainedLayer(LayerRetention(own, i, held), seen)
        elif type(layer) is DynamicSlidingWindowLayer:
            if windows and type(before) is not DynamicSlidingWindowLayer and _slides(config, i):
                held = None if before is None else _held(before, i)
                layers[i] = _window(layer.sliding_window, i, held)
            elif type(before) is DynamicSlidingWindowLayer:
                window: Any = copy.copy(before)
                window.keys = window.keys.detach().to(window.device, copy=True)  # if offloaded
                window.values = window.values.detach().to(window.device, copy=True)
                layers[i] = window
            elif before is not None:
                layer.update(*_held(before, i))
        elif isinstance(layer, CacheLayerMixin) or before is not None:
            raise SparsityError(
                f"layer {i} of this model keeps a {type(layer).__name__}, which SparseCache cannot "
                "manage or take over; use this model without SparseCache"
            )
        if before is not None:
            seen, batch = layers[i].get_seq_length(), before.keys.shape[0]
            if rows.batch is not None and (rows.batch, rows.seen) != (batch, seen):
                raise SparsityError(
                    f"past holds {rows.batch} rows of {rows.seen} tokens in one layer and {batch} "
                    f"of {seen} in layer {i}: hand in a cache whose layers agree"
                )
            rows = BatchRows(batch=batch, seen=seen)
    return layers, rows


def _slides(config: Any, index: int) -> bool:
    """Whether the layer's mask is that of a sliding window, and not one of chunks."""
    kinds = getattr(config, "layer_types", None)
    return kinds is None or kinds[index] == "sliding_attention"


def _window(tokens: int, index: int, held: tuple[Tensor, Tensor] | None) -> RetainedLayer:
    """A layer that keeps its newest `tokens`, which are all that a new token attends to."""
    policy = StreamingLLM(tokens, sinks=0, positions="absolute")
    retention = LayerRetention(policy, index, held)
    retention.window = True
    return RetainedLayer(retention, 0 if held is None else held[0].shape[2])


def _held(layer: Any, index: int) -> tuple[Tensor, Tensor]:
    held, seen = layer.keys.shape[2], layer.get_seq_length()
    if held != seen or isinstance(layer, RetainedLayer):
        raise SparsityError(
            f"layer {index} of past holds {held} of the {seen} tokens it has seen (or is a "
            "SparseCache's); go on from a cache that keeps every token, such as DynamicCache()"
        )
    return layer.keys.detach(), layer.values.detach()
