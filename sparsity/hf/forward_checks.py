"""What is refused before a forward has changed anything in a cache, each by its own cause."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsity.errors import SparsityError

WEIGHTS_AWAY = (
    "the weights of this model are on the device 'meta', that is, they are not here: load them "
    "(from_pretrained), or place the model with hooks that bring them (accelerate's cpu_offload, "
    "disk_offload, or device_map)"
)


def check_call(decoder: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Raise SparsityError where the decoder, called so, cannot be served right from a cache."""
    if arguments.get("use_cache") is False:
        raise SparsityError(
            "use_cache=False, and a SparseCache was handed in all the same: without the use of a "
            "cache generate feeds the whole text again at each step. Leave out use_cache=False "
            "(of the call, or of model.generation_config), or leave out the cache"
        )
    if decoder.training:
        _check_training(decoder)


def _check_training(decoder: PreTrainedModel) -> None:
    name = type(decoder).__name__
    if decoder.is_gradient_checkpointing:
        raise SparsityError(
            f"gradient checkpointing is on and {name} is in training mode, where transformers "
            "leaves out every cache; call model.eval(), or "
            "model.gradient_checkpointing_disable()"
        )
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


def check_states(layer: Any, index: int, keys: Tensor, values: Tensor) -> None:
    """Raise SparsityError unless new keys and values can stand beside those a layer holds."""
    if keys.is_meta:
        raise SparsityError(WEIGHTS_AWAY)
    for new, held in ((keys, layer.keys), (values, layer.values)):
        if held is not None and held.dtype != new.dtype:
            now = torch.is_autocast_enabled(new.device.type)
            raise SparsityError(
                f"layer {index} of this SparseCache holds {held.dtype}, and this forward brings "
                f"{new.dtype}: "
                + (
                    "torch.autocast is on now, and was not on in the same way before"
                    if now
                    else "the model was converted since (model.bfloat16(), model.to(dtype)), or "
                    "torch.autocast was on before and is off now"
                )
                + ". Run every forward of a text in the same dtype, or call cache.reset()"
            )
