"""What is refused before a forward has changed anything in a cache, each by its own cause."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsity.errors import SparsityError
from sparsity.hf.layers import RetainedLayer

WEIGHTS_AWAY = (
    "the weights of this model are on the device 'meta', that is, they are not here: load them "
    "(from_pretrained), or place the model with hooks that bring them (accelerate's cpu_offload, "
    "disk_offload, or device_map)"
)

_ONE_DTYPE = "Run every forward of a text in the same dtype, or call cache.reset()"


def check_call(decoder: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Raise SparsityError where the decoder, called so, cannot be served right from a cache."""
    if arguments.get("use_cache") is False:
        raise SparsityError(
            "use_cache=False, and a SparseCache was handed in all the same: without the use of a "
            "cache generate feeds the whole text again at each step. Leave out use_cache=False "
            "(of the call, or of model.generation_config), or leave out the cache"
        )
    tokens = [arguments.get(name) for name in ("input_ids", "inputs_embeds")]
    if any(given is not None and given.is_meta for given in tokens):
        raise SparsityError(WEIGHTS_AWAY)
    if decoder.training:
        check_checkpointing(decoder)
        _check_dropout(decoder)


def check_checkpointing(decoder: PreTrainedModel) -> None:
    """Raise SparsityError where gradient checkpointing leaves out the cache of a layer."""
    for path, module in decoder.named_modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            name = f"{type(decoder).__name__}{'.' if path else ''}{path}"
            raise SparsityError(
                f"gradient checkpointing is on and {name} is in training mode, where transformers "
                "leaves out every cache; call model.eval(), or "
                "model.gradient_checkpointing_disable()"
            )


def _check_dropout(decoder: PreTrainedModel) -> None:
    name = type(decoder).__name__
    drops = [
        f"{path or name} (p={module.p})"
        for path, module in decoder.named_modules()
        if isinstance(module, nn.Dropout) and module.training and module.p > 0
    ]
    if chance := getattr(decoder.config, "attention_dropout", 0.0):
        drops.append(f"attention_dropout={chance}")
    if drops:
        raise SparsityError(
            f"{name} is in training mode and drops at random: {', '.join(drops[:3])}"
            f"{', ...' if len(drops) > 3 else ''}. What a cache holds would be noise; call "
            "model.eval() before decoding"
        )


def check_attention_dropout(module: nn.Module, dropout: float) -> None:
    """Raise SparsityError for a layer whose attention drops at random."""
    if dropout:
        raise SparsityError(
            f"{type(module).__name__} drops {dropout} of its attention at random (training mode); "
            "call model.eval() before decoding"
        )


def check_autocast(now: torch.dtype | None, before: torch.dtype | None) -> None:
    """Raise SparsityError unless a forward is under the autocast dtype of those before it."""
    if now != before:
        said = ["off" if dtype is None else f"on, to {dtype}" for dtype in (now, before)]
        raise SparsityError(
            f"torch.autocast is {said[0]} now and was {said[1]} in the forwards that filled this "
            f"SparseCache. {_ONE_DTYPE}"
        )


def check_states(layer: Any, index: int, keys: Tensor, values: Tensor) -> None:
    """Raise SparsityError unless new keys and values can stand beside those a layer holds."""
    if keys.is_meta:
        raise SparsityError(WEIGHTS_AWAY)
    pairs = [(keys, layer.keys), (values, layer.values)]
    if not isinstance(layer, RetainedLayer):
        pairs.pop()  # transformers' own layers may widen their values
    for new, held in pairs:
        if held is None:
            continue
        if held.shape[1] != new.shape[1] or held.shape[3] != new.shape[3]:
            shapes = [f"{t.shape[1]} KV heads of {t.shape[3]} numbers" for t in (held, new)]
            raise SparsityError(
                f"layer {index} of this SparseCache holds {shapes[0]}, and the model has "
                f"{shapes[1]}: what was handed in as past is another model's. Hand in a cache that "
                "this model filled"
            )
        if held.dtype != new.dtype:
            raise SparsityError(
                f"layer {index} of this SparseCache holds {held.dtype}, and this forward brings "
                f"{new.dtype}: the model was converted since (model.bfloat16(), "
                "model.to(dtype)), or what was handed in as past was made in another dtype. "
                f"{_ONE_DTYPE}"
            )
