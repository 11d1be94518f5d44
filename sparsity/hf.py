"""The only file that knows transformers: cache, layer, attention and mask functions, hooks."""

import copy
import inspect
import uuid
from functools import partial
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PreTrainedModel,
)
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import causal_mask_function, sdpa_mask

from sparsity.attention import attend
from sparsity.cache import SparseCache
from sparsity.errors import SparsityError
from sparsity.masks import LazyMask
from sparsity.policies import Full
from sparsity.policy import Policy
from sparsity.report import Report
from sparsity.retention import Retention, storage_bytes
from sparsity.rows import Rows
from sparsity.state import CacheState

NAME = "kv_retention"  # of the attention function; names with "sdpa" or "flash" mean something
KWARG = "sparse_cache"  # how the cache reaches the attention function
_REFUSED = ("position_bias", "indices", "block_mask", "score_mod", "alibi", "attention_bias")


class RetainedLayer(DynamicLayer):
    """A full-attention layer under a policy; `keys` and `values` are what is held."""

    is_croppable = False
    is_compileable = False

    def __init__(self, retention: Retention, seen: int = 0) -> None:
        super().__init__()
        self.retention = retention
        self.seen = seen
        self.pending: tuple[torch.Size, torch.Size] | None = None  # shapes given to `update`
        self.show()

    def show(self) -> None:
        """Point `keys` and `values` at the tensors held."""
        held = self.retention.held
        self.keys, self.values = (None, None) if held is None else held
        self.is_initialized = held is not None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count the new tokens and hand them on: the attention function stores them."""
        self.seen += key_states.shape[-2]
        self.pending = (key_states.shape, value_states.shape)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if everything were kept: masks are evaluated on columns."""
        return self.seen + query_length, 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused by the cache."""
        _refuse_rollback()

    def activate_past_recording(self) -> None:
        """Refused by the cache."""
        _refuse_rollback()

    def reset(self) -> None:
        """Forget everything."""
        self.retention.clear()
        self.seen = 0
        self.show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of `indices`, in that order."""
        self.retention.map(lambda t: t[indices.to(t.device)])
        self.show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The same, as beam search asks for it."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        self.retention.map(lambda t: t.repeat_interleave(repeats, dim=0))
        self.show()


class BoundSparseCache(SparseCache, Cache):
    """SparseCache as transformers sees it."""

    def __init__(self, model: PreTrainedModel, policy: Policy, past: Cache | None = None) -> None:
        if not isinstance(policy, Policy):
            raise SparsityError(
                f"SparseCache(policy={policy!r}): expected a policy such as RaaS(budget=1024)"
            )
        decoder = _decoder_of(model)
        layers, rows = _build_layers(decoder.config, policy, past)
        attach_model(model)
        Cache.__init__(self, layers=layers)
        managed = [layer.retention for layer in layers if isinstance(layer, RetainedLayer)]
        self._state = CacheState(policy, {x.layer: x for x in managed}, rows)
        self._state.peak_bytes = sum(_layer_bytes(layer) for layer in layers)
        self._stock = _stock_layers(decoder.config, policy)
        self._model = _TOKENS[decoder]
        self._dropped_at = _dropped_at(decoder.config)

    @property
    def policy(self) -> Policy:
        """The policy of this cache."""
        return self._state.policy

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention: count the new tokens and hand them on."""
        if self._state.step is None:
            raise SparsityError(
                "a SparseCache works with an attached model only, and this one is detached (or its "
                "decoder was called past its hooks); call attach(model) first"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def begin(self, token: str, arguments: dict[str, Any]) -> None:
        """Check one forward and plan it; nothing has changed when it raises SparsityError."""
        if token != self._model:
            raise SparsityError(
                "this SparseCache was made for another model; make one for this model with "
                "SparseCache(model, policy)"
            )
        step, times = self._state.plan(arguments)
        if step.stop == self._dropped_at:
            raise SparsityError(
                f"this model drops its cache when a text grows past {self._dropped_at} tokens "
                "(original_max_position_embeddings, where its rotation changes), and would go on "
                "without the SparseCache; keep the prompt and the new tokens below that"
            )
        if times > 1:
            self.batch_repeat_interleave(times)
        self._state.open(step)

    def attend(
        self, layer: RetainedLayer, query: Tensor, key: Tensor, value: Tensor, **scores: Any
    ) -> Tensor:
        """Attention of one managed layer in the current forward."""
        index = layer.retention.layer
        if layer.pending != (key.shape, value.shape):
            self.give_up(
                f"layer {index} attends to other tensors than it gave to the cache (latent "
                "attention, or keys shared between layers)"
            )
        layer.pending = None
        out = self._state.attend(index, query, key, value, **scores)
        layer.show()
        return out

    def finish(self) -> None:
        """Close one forward: every managed layer must have come through the attention function."""
        if missed := self._state.missed():
            self.give_up(
                f"layers {missed} did not reach the attention function with the cache: the model "
                "drops keyword arguments on the way, or its attention implementation was changed"
            )
        stock = [layer for layer in self.layers if not isinstance(layer, RetainedLayer)]
        self._state.close(sum(_layer_bytes(layer) for layer in stock))

    def give_up(self, why: str) -> NoReturn:
        """Detach the model and raise SparsityError: it cannot be served right."""
        for decoder, attachment in list(_ATTACHED.items()):
            if attachment.token == self._model:
                _remove(decoder)
        raise SparsityError(f"SparseCache does not support this model: {why}. It was detached")

    def report(self) -> Report:
        """What is held now, measured from the tensors; waits for the device."""
        managed = tuple(isinstance(layer, RetainedLayer) for layer in self.layers)
        tokens = [
            self._state.kept(i) if managed[i] else (_stock_tokens(layer), 0)
            for i, layer in enumerate(self.layers)
        ]
        return Report(
            policy=self._state.policy,
            tokens_seen=self._state.rows.seen,
            tokens_kept=tuple(kept for kept, _ in tokens),
            evictions=tuple(dropped for _, dropped in tokens),
            managed=managed,
            num_bytes=sum(_layer_bytes(layer) for layer in self.layers),
            peak_bytes=self._state.peak_bytes,
        )

    def reset(self) -> None:
        """Forget everything: as new, `past` gone too."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, RetainedLayer):
                layer.reset()
            else:
                self.layers[i] = copy.deepcopy(self._stock[i])
        self._state.clear()

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take the rows of `beam_idx`, int64 `[rows]`, in that order."""
        super().reorder_cache(beam_idx)
        self._state.take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of `indices`, int64 numbers or a bool mask."""
        super().batch_select_indices(indices)
        self._state.take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        super().batch_repeat_interleave(repeats)
        if (batch := self._state.rows.batch) is not None:
            self._state.take(torch.arange(batch).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Refused: assisted decoding goes back."""
        _refuse_rollback()

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, unless there is nothing to remove."""
        if tokens_to_remove:
            _refuse_rollback()


def _refuse_rollback() -> NoReturn:
    raise SparsityError(
        "a SparseCache cannot go back to an earlier token, so assisted and prompt-lookup decoding "
        "and crop() are refused; generate without an assistant, or use a DynamicCache"
    )


def _dropped_at(config: Any) -> int | None:
    """Tokens after which `prepare_inputs_for_generation` of the Phi-3 family drops any cache."""
    if config.model_type not in ("phi3", "phimoe", "phi4_multimodal"):
        return None
    return getattr(config, "original_max_position_embeddings", None)


def _stock_tokens(layer: Any) -> int:
    held = getattr(layer, "keys", None)  # linear attention has no keys
    return 0 if held is None or held.dim() < 2 else held.shape[-2]


def _layer_bytes(layer: Any) -> int:
    if isinstance(layer, RetainedLayer):
        return layer.retention.num_bytes
    held = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    return storage_bytes(held)


def _stock_layers(config: Any, policy: Policy) -> dict[int, Any]:
    layers, _ = _build_layers(config, policy, None)
    return {i: layer for i, layer in enumerate(layers) if not isinstance(layer, RetainedLayer)}


def _build_layers(config: Any, policy: Policy, past: Cache | None) -> tuple[list[Any], Rows]:
    """The layers transformers would use, full attention under the policy; and where they stand."""
    layers: list[Any] = DynamicCache(config=config).layers
    earlier: list[Any] = [None] * len(layers) if past is None else list(past.layers)
    if len(earlier) != len(layers):
        raise SparsityError(
            f"past has {len(earlier)} layers and the model {len(layers)}: hand in a cache that "
            "this model filled"
        )
    rows, n = Rows(), len(layers)
    for i, layer in enumerate(layers):
        before: Any = earlier[i]
        if before is not None and not before.is_initialized:
            before = None
        if type(layer) is DynamicLayer:
            held = None if before is None else _held(before, i)
            small = policy.at_layer(i, n) if i >= policy.dense_layers else Full(policy.page_size)
            seen = 0 if held is None else held[0].shape[2]
            layers[i] = RetainedLayer(Retention(small, i, held), seen)
        elif type(layer) is DynamicSlidingWindowLayer:
            if type(before) is DynamicSlidingWindowLayer:
                window: Any = copy.copy(before)
                window.keys = window.keys.detach().clone()
                window.values = window.values.detach().clone()
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
            rows = Rows(batch=batch, seen=seen)
    return layers, rows


def _held(layer: Any, index: int) -> tuple[Tensor, Tensor]:
    held, seen = layer.keys.shape[2], layer.get_seq_length()
    if held != seen or isinstance(layer, RetainedLayer):
        raise SparsityError(
            f"layer {index} of past holds {held} of the {seen} tokens it has seen (or is a "
            "SparseCache's); go on from a cache that keeps every token, such as DynamicCache()"
        )
    return layer.keys.detach(), layer.values.detach()


def retention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> LazyMask:
    """The registered mask function: keeps the rule, makes no tensor."""
    dense = partial(
        sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        **kwargs,
    )
    rule = None if mask_function is causal_mask_function else mask_function
    return LazyMask(rule, attention_mask, use_vmap, dense)


def retention_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    sparse_cache: BoundSparseCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: managed layers by their policy, all others dense."""
    refused = [name for name in _REFUSED if kwargs.get(name) is not None]
    if refused:
        raise SparsityError(
            f"{type(module).__name__} changes its scores by {refused}, which is not supported; "
            "call detach(model) and use this model without SparseCache"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sparse_cache is not None:
        index: int = module.layer_idx  # type: ignore[assignment]
        layer = sparse_cache.layers[index] if index < len(sparse_cache.layers) else None
        if isinstance(layer, RetainedLayer):
            mask = attention_mask
            if not isinstance(mask, LazyMask):
                mask = LazyMask(None, None, mask is not None, lambda: None)
            out = sparse_cache.attend(
                layer, query, key, value, mask=mask, scaling=scaling, softcap=softcap, sinks=s_aux
            )
            return out, None
        if type(layer) is not DynamicSlidingWindowLayer:
            sparse_cache.give_up(f"layer {index} has no cache of its own (it shares keys)")
    mask = attention_mask.tensor() if isinstance(attention_mask, LazyMask) else attention_mask
    causal = module.is_causal if is_causal is None else is_causal
    causal = bool(causal) and mask is None and query.shape[2] > 1
    mask = None if mask is None else mask[..., : key.shape[2]].to(query.device)
    out = attend(query, key, value, mask, scaling, causal, softcap, s_aux, dropout)
    return out, None


class _Attachment:
    """The two hooks on a decoder, and what it was before."""

    def __init__(self, decoder: PreTrainedModel, token: str) -> None:
        self.token = token
        self.names = tuple(inspect.signature(decoder.forward).parameters)
        self.previous = _implementation(decoder)
        self.handles = (
            decoder.register_forward_pre_hook(self.before, with_kwargs=True),
            decoder.register_forward_hook(self.after, with_kwargs=True),
        )

    def before(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Check the call and hand the cache on to the attention function."""
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        cache = arguments.get("past_key_values")
        if not isinstance(cache, BoundSparseCache):
            return None
        cache.begin(self.token, arguments)
        return args, {**kwargs, KWARG: cache}

    def after(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Check that the cache got there."""
        cache = kwargs.get(KWARG)
        if cache is not None:
            cache.finish()


_ATTACHED: WeakKeyDictionary[nn.Module, _Attachment] = WeakKeyDictionary()
_TOKENS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # outlive a detach


def _decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise SparsityError(
            f"expected a transformers model (a PreTrainedModel), got {name}; for a wrapped model "
            "hand in the model inside"
        )
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or model.config.is_encoder_decoder:
        raise SparsityError(
            f"{name} has no decoder that SparseCache can manage (decoder-only models for text "
            "generation are supported); use it with a cache of transformers"
        )
    if getattr(decoder.config, "kv_lora_rank", None) is not None:
        raise SparsityError(
            f"{name} caches latents (multi-head latent attention), of which the keys are made only "
            "after the cache; this is not supported, use a DynamicCache"
        )
    return decoder


def _implementation(decoder: Any) -> str:
    return decoder.config._attn_implementation  # noqa: SLF001 (there is no public reader)


def attach_model(model: PreTrainedModel) -> None:
    """See `sparsity.attach`."""
    decoder = _decoder_of(model)
    name, now = type(model).__name__, _implementation(decoder)
    attached = decoder in _ATTACHED
    if attached and now == NAME:
        return
    if now == NAME:
        raise SparsityError(
            f"this {name} is a copy of an attached model; detach(model) before copying it"
        )
    AttentionInterface.register(NAME, retention_attention)
    AttentionMaskInterface.register(NAME, retention_mask)
    try:
        decoder.set_attn_implementation(NAME)
    except ValueError as error:
        raise SparsityError(f"{name} refuses another attention function: {error}") from error
    if _implementation(decoder) != NAME:
        raise SparsityError(
            f"{name} is not written on transformers' attention interface, so its attention cannot "
            "be reached; use it with a cache of transformers"
        )
    if attached:  # the implementation was set anew in between: that is what to go back to
        _ATTACHED[decoder].previous = now
        return
    token = _TOKENS.setdefault(decoder, uuid.uuid4().hex)
    attachment = _Attachment(decoder, token)
    attachment.previous = now
    _ATTACHED[decoder] = attachment


def detach_model(model: PreTrainedModel) -> None:
    """See `sparsity.detach`."""
    _remove(_decoder_of(model))


def _remove(decoder: Any) -> None:
    attachment = _ATTACHED.pop(decoder, None)
    if attachment is None:
        return
    for handle in attachment.handles:
        handle.remove()
    if _implementation(decoder) == NAME:
        decoder.set_attn_implementation(attachment.previous)
