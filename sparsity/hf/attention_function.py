"""The mask and attention functions that an attached model has, as transformers calls them."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.masking_utils import causal_mask_function, sdpa_mask

from sparsity.errors import SparsityError
from sparsity.hf.autocast import lowered
from sparsity.hf.forward_checks import check_attention_dropout
from sparsity.hf.layers import RetainedLayer
from sparsity.hf.own_attention import own_attention, own_mask
from sparsity.hf.served_cache import ServedCache
from sparsity.retention.attention import attend
from sparsity.retention.lazy_mask import LazyMask

KWARG = "sparse_cache"  # how the cache reaches the attention function
_REFUSED = {"position_bias", "indices", "block_mask", "score_mod", "alibi", "attention_bias"}


def retention_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, *args: Any, **kwargs: Any
) -> LazyMask | None:
    """The mask function for transformers: keeps the rule as a `LazyMask`, makes no tensor.

    In an armed step of decoding, which asks for a single key, there is no mask: what is held is
    real, older than the query, and inside a layer's window.
    """
    if kv_length == q_length == 1 and isinstance(q_offset, Tensor) and not kwargs.get("use_vmap"):
        return None
    return _lazy_mask(batch_size, q_length, kv_length, q_offset, *args, **kwargs)


@torch.compiler.disable
def _lazy_mask(
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
    """What transformers asks for, as a rule that is not evaluated yet."""
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
        **kwargs,
    }
    padding = attention_mask
    if q_length == 1 and padding is not None and padding.device.type == "cpu" and padding.all():
        padding = None  # generate hands one in at each step; a look at it waits for nothing here
    return LazyMask(
        rule=None if mask_function is causal_mask_function else mask_function,
        padding=padding,
        custom=use_vmap,
        dense=partial(sdpa_mask, **arguments),
        lengths=(q_length, kv_length),
        masks=partial(own_mask, arguments=arguments),
        unmodified=kwargs.get("allow_is_causal_skip", True),  # transformers' own word for it
    )


def _check_scores(module: nn.Module, kwargs: dict[str, Any]) -> None:
    refused = sorted(name for name in _REFUSED if kwargs.get(name) is not None)
    if refused:
        raise SparsityError(
            f"{type(module).__name__} changes its scores by {refused}, which is not supported; "
            "call detach(model) and use this model without SparseCache"
        )


def retention_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function for transformers: managed layers by their policy, others densely."""
    cache = kwargs.get(KWARG)
    if cache is not None and cache.armed:
        return _decode_attention(module, query, key, value, *args, **kwargs)
    return _retention_attention(module, query, key, value, *args, **kwargs)


def _decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sparse_cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in an armed step."""
    index: int = module.layer_idx  # type: ignore[assignment]
    if attention_mask is not None:
        raise SparsityError(
            f"{type(module).__name__} masks some of the tokens held from a new one, and a compiled "
            "step of decoding has no mask: make the cache with static=False"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = {"scaling": scaling, "softcap": softcap, "sinks": s_aux}
    return sparse_cache.decode(sparse_cache.layers[index], query, key, value, **scores), None


@torch.compiler.disable
def _retention_attention(
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
    sparse_cache: ServedCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention in any other forward.

    Layers under a policy by their policy, and others by the function that the model had before it
    was attached; that function computes whole prompts of both.
    """
    own = None
    if sparse_cache is None or query.shape[2] > 1:
        given = kwargs | {"scaling": scaling, "dropout": dropout}
        maybe = {"softcap": softcap, "s_aux": s_aux, "is_causal": is_causal}
        given |= {name: value for name, value in maybe.items() if value is not None}
        own = own_attention(module, attention_mask, given)
        if own is not None and sparse_cache is None:  # exactly as if it were not attached
            return own.call(query, key, value, given)
    if not _REFUSED.isdisjoint(kwargs):
        _check_scores(module, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sparse_cache is not None:
        index: int = module.layer_idx  # type: ignore[assignment]
        layer = sparse_cache.layers[index] if index < len(sparse_cache.layers) else None
        if isinstance(layer, RetainedLayer):
            check_attention_dropout(module, dropout)
            mask = attention_mask
            if not isinstance(mask, LazyMask):
                mask = LazyMask(None, None, mask is not None, lambda: None)
            scores = {"mask": mask, "scaling": scaling, "softcap": softcap, "sinks": s_aux}
            scores["own"] = own
            dtype = sparse_cache.autocast
            if dtype is None:
                return sparse_cache.attend(layer, query, key, value, **scores), None
            with torch.autocast(query.device.type, enabled=False):  # keys and values are lowered
                query = lowered(query, dtype)
                return sparse_cache.attend(layer, query, key, value, **scores), None
        if type(layer) is not DynamicSlidingWindowLayer:
            sparse_cache.give_up(f"layer {index} has no cache of its own (it shares keys)")
        if own is not None and not own.refused(query, key, value):
            return own(query, key, value), None
    mask = attention_mask.tensor() if isinstance(attention_mask, LazyMask) else attention_mask
    causal = module.is_causal if is_causal is None else is_causal
    causal = bool(causal) and mask is None and query.shape[2] > 1
    mask = None if mask is None else mask[..., : key.shape[2]].to(query.device)
    out = attend(query, key, value, mask, scaling, causal, softcap, s_aux, dropout)
    return out, None
