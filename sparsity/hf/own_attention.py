"""The model's own attention function, the one that it had before it was attached.

It computes what needs no rule of ours: prompts of a `SparseCache`, and everything of other caches.
It is called with what transformers would hand it, the mask in its own form included.
"""

import copy
import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsity.retention.lazy_mask import LazyMask

_EAGER = "eager_attention_forward"  # how model files name, or end the name of, their own function
_MOST_FLASH_HEAD_DIM = 256
_HALF = (torch.float16, torch.bfloat16)
# Arguments that layers hand to any attention function and that change nothing in a prompt.
_NEUTRAL = {
    "scaling", "dropout", "softcap", "s_aux", "is_causal", "sliding_window", "position_ids",
    "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "num_items_in_batch", "logits_to_keep",
}  # fmt: skip

# The implementation of each module of an attached decoder before it was attached.
_BEFORE: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def remember(decoder: PreTrainedModel, implementation: str) -> None:
    """Note which implementation the decoder's layers had, when it is attached."""
    for module in decoder.modules():
        _BEFORE[module] = implementation


def forget(decoder: PreTrainedModel) -> None:
    """Undo `remember`, when the decoder is detached."""
    for module in decoder.modules():
        _BEFORE.pop(module, None)


class OwnAttention:
    """The attention function that one layer had before its model was attached, in one call of it.

    Args:
        module: the layer's attention module.
        name: the implementation, as in `attn_implementation`.
        function: that of the implementation.
        mask: of the forward.
        arguments: those that the layer was called with, by name, besides tensors and mask.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        function: Callable[..., tuple[Tensor, Tensor | None]],
        mask: Any,
        arguments: dict[str, Any],
    ) -> None:
        self.module, self.name, self.function = module, name, function
        self.mask, self.arguments = mask, arguments

    @property
    def flash(self) -> bool:
        """Whether it is a flash attention kernel, of a package or of the Hub."""
        return self.name.startswith("flash_attention") or "/" in self.name

    def refused(self, query: Tensor, key: Tensor, value: Tensor) -> str:
        """Why it cannot compute a prompt right; empty where it can.

        Args:
            query: `[batch, query_heads, tokens, head_dim]`.
            key: `[batch, kv_heads, keys, head_dim]`; of a layer that transformers manages there may
                be more keys than queries.
            value: `[batch, kv_heads, keys, value_dim]`.
        """
        given, name, mask = self.arguments, self.name, self.mask
        for argument, given_value in given.items():
            if given_value is not None and argument not in _NEUTRAL:
                return f"the model hands over {argument!r}"
        causal = given.get("is_causal")
        if not (getattr(self.module, "is_causal", True) if causal is None else causal):
            return "the layer is not causal"
        if not isinstance(mask, LazyMask) or mask.masks is None:
            return "the model made no mask for it"
        if mask.custom:
            return "the model masks by a function of its own"
        if mask.lengths != (query.shape[2], key.shape[2]):
            return "its mask is for another number of tokens"
        if name == "eager":
            return ""
        if given.get("s_aux") is not None:
            return f"{name} is not known to compute attention sinks"
        if name == "flex_attention":
            return ""
        if name == "sdpa":
            return "" if given.get("softcap") is None else "sdpa computes no soft cap"
        return self._refused_by_flash(query, value) if self.flash else f"{name} is not known"

    def _refused_by_flash(self, query: Tensor, value: Tensor) -> str:
        name, head_dim = self.name, query.shape[-1]
        if query.dtype not in _HALF or value.dtype not in _HALF:
            return f"{name} computes in float16 and bfloat16, not in {query.dtype}"
        if head_dim > _MOST_FLASH_HEAD_DIM or value.shape[-1] != head_dim:
            return f"{name} computes no heads of {head_dim} and {value.shape[-1]} numbers"
        if "/" in name and self.arguments.get("softcap") is not None:
            return f"{name} is not known to compute a soft cap"
        if not self.mask.plain:
            return f"{name} does not take the layer's mask"
        windowed = self.arguments.get("sliding_window") is not None
        if windowed != (self.mask.rule is not None):
            return f"{name} does not take the layer's mask"
        return ""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of a prompt, `[batch, tokens, query_heads, value_dim]`."""
        arguments = dict(self.arguments)
        if self.flash:  # by them it would look, waiting for the device, for several texts in a row
            arguments.pop("position_ids", None)
        return self.call(query, key, value, arguments)[0]

    def call(
        self, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """What transformers would get from the function, were the model not attached."""
        mask = self.mask
        if isinstance(mask, LazyMask):
            mask = mask.own(self.name)
        if isinstance(mask, Tensor) and mask.device != query.device:
            mask = mask.to(query.device)
        module = self.module
        if self.flash:  # chooses its kernel by the name in the module's configuration
            module = copy.copy(module)
            config: Any = copy.copy(module.config)
            config._attn_implementation = {"": self.name}  # noqa: SLF001 (of this config alone)
            module.config = config
        return self.function(module, query, key, value, mask, **arguments)


def own_attention(module: nn.Module, mask: Any, arguments: dict[str, Any]) -> OwnAttention | None:
    """The function that a layer had before its model was attached; None where it is not known.

    Args:
        module: the layer's attention module.
        mask: of the forward: a `LazyMask`, or what the user or the model made.
        arguments: those that the layer was called with, by name, besides tensors and mask.
    """
    name = _BEFORE.get(module)
    forward = inspect.unwrap(type(module).forward)
    if name is None or not isinstance(forward, FunctionType):
        return None
    function = _function(forward, name)
    return None if function is None else OwnAttention(module, name, function, mask, arguments)


def own_mask(name: str, arguments: dict[str, Any]) -> Any:
    """The mask of an implementation, from the arguments of its mask function."""
    make = ALL_MASK_ATTENTION_FUNCTIONS.get(name)  # transformers makes no mask without one
    return None if make is None else make(**arguments)


def _function(forward: FunctionType, name: str) -> Callable[..., Any] | None:
    """The attention function of an implementation, as an attention module's `forward` finds it.

    "eager" is a function of the file that the module is written in, which its forward names.
    """
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS.get(name)
    named = _eager_name(forward)
    return None if named is None else forward.__globals__.get(named)


@cache
def _eager_name(forward: FunctionType) -> str | None:
    named = [name for name in forward.__code__.co_names if name.endswith(_EAGER)]
    return named[0] if len(named) == 1 else None
