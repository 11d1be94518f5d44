"""Conditions under which a model would make keys and values that a chunk's key does not stand for.

Dropout, autocast, offloaded weights or another dtype change what a layer caches, but not the hash
of the weights that is part of a chunk's key. Each is refused by its own name: when `PIC` is made,
at every compile and link before the store is asked, and inside the forward itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from picache.errors import PICacheError

_SAME_IN_TRAINING = (nn.Linear, nn.Embedding)
_PACKING = "torch.ao.nn.quantized"  # modules with weights in no parameter or buffer


def refuse_other_objects(model: object) -> None:
    """Raise PICacheError unless `model` is an instance of transformers' `PreTrainedModel`."""
    if isinstance(model, PreTrainedModel):
        return
    remedy = "load it with AutoModelForCausalLM.from_pretrained"
    given = type(model).__name__
    if isinstance(model, str):
        given, remedy = f"the text {model!r}", f"{remedy}({model!r})"
    elif isinstance(model, type):
        given = f"the class {model.__name__}"
        remedy = f"give an instance of it, {model.__name__}.from_pretrained(...)"
    elif isinstance(model, nn.Module) and "_orig_mod" in dict(model.named_children()):
        remedy = (
            "torch.compile(model) wraps the model: give PIC the model itself, and compile it in "
            "place with model.compile()"
        )
    raise PICacheError(f"PIC needs a transformers PreTrainedModel, got {given}: {remedy}")


@dataclass(frozen=True)
class ModelState:
    """What a model's keys and values depend on, besides the values of its weights.

    Attributes:
        dtype: of its weights.
        quantised: names what its weights are quantised by; empty where they are not.
        packed: the first module whose weights are neither parameters nor buffers; empty for none.
        training: the first module in training mode; None where all are in evaluation mode.
        tensors: how many parameters and buffers it has.
        away: the names of those that are not in memory.
        devices: the kinds of device the others are on.
    """

    dtype: torch.dtype
    quantised: str
    packed: str
    training: str | None
    tensors: int
    away: tuple[str, ...]
    devices: frozenset[str]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelState":
        """The state the model is in now."""
        quantised, packed, training = "", "", None
        for where, module in model.named_modules():
            # Linear layers and embeddings do the same in both modes, and
            # resize_token_embeddings makes new ones in training mode.
            if training is None and module.training and type(module) not in _SAME_IN_TRAINING:
                training = where
            if not packed and type(module).__module__.startswith(_PACKING):
                packed, quantised = where, f"{type(module).__name__} ({where})"
        tensors = [*model.named_parameters(), *model.named_buffers()]
        devices = {tensor.device.type for _, tensor in tensors}
        away = tuple(name for name, tensor in tensors if tensor.device.type == "meta")
        quantised = next(filter(None, (_fewer_bits(*one) for one in tensors)), quantised)
        quantizer = getattr(model, "hf_quantizer", None)  # set by transformers where it quantised
        if quantizer is not None:
            quantised = type(quantizer).__name__
        kinds = frozenset(devices - {"meta"})
        return cls(model.dtype, quantised, packed, training, len(tensors), away, kinds)


def _fewer_bits(name: str, tensor: Tensor) -> str:
    """Names the type of a quantised weight; empty for one that is not."""
    if is_traceable_wrapper_subclass(tensor):
        return f"{type(tensor).__name__} ({name})"
    small = tensor.dim() > 1 and tensor.itemsize == 1 and tensor.dtype != torch.bool
    return f"{tensor.dtype} ({name})" if small else ""


def refuse_ambient(model: PreTrainedModel, made: ModelState | None = None) -> ModelState:
    """Raise PICacheError where keys and values made now would not be those the key stands for.

    Args:
        model: the model that is about to prefill or link.
        made: its state when `PIC` was made; None while `PIC` is being made.

    Returns:
        The state it is in now.
    """
    name, now = type(model).__name__, ModelState.of(model)
    if now.training is not None:
        what = f"module {now.training!r} of {name}" if now.training else name
        checkpointed = any(getattr(one, "gradient_checkpointing", False) for one in model.modules())
        also = ", and gradient checkpointing leaves out the cache" if checkpointed else ""
        raise PICacheError(
            f"{what} is in training mode, where dropout changes keys and values{also}: call "
            "model.eval() first"
        )
    if now.away:
        raise PICacheError(
            f"{len(now.away)} of the {now.tensors} weights of {name} are not in memory (the first "
            f"is {now.away[0]!r}): they were offloaded to disk or to the CPU (device_map, "
            "accelerate's cpu_offload), or never loaded. What is not here cannot be told from "
            "other weights: load the whole model, on several devices if it fits none"
        )
    for kind in sorted(now.devices):
        refuse_autocast(kind)
    if now.packed:
        raise PICacheError(
            f"{name} keeps the weights of {now.packed!r} packed in a "
            f"{type(model.get_submodule(now.packed)).__name__} quantised by torch, where they "
            "cannot be told from other weights, and most often quantises activations too, so that "
            "a token's keys depend on the tokens computed with it: load the model without "
            "quantisation, or quantise the weights alone"
        )
    if made is not None and now.dtype != made.dtype:
        raise PICacheError(
            f"{name} had weights in {made.dtype} when PIC was made of it and has {now.dtype} now: "
            "make a new PIC(model); chunks of the two are kept apart"
        )
    if made is not None and now.quantised != made.quantised:
        before, after = (
            f"quantised by {one}" if one else "not quantised"
            for one in (made.quantised, now.quantised)
        )
        raise PICacheError(
            f"{name} was {before} when PIC was made of it and is {after} now: make a new "
            "PIC(model); chunks of the two are kept apart"
        )
    return now


def refuse_autocast(kind: str) -> None:
    """Raise PICacheError where torch.autocast is on for devices of this kind."""
    if torch.is_autocast_enabled(kind):
        raise PICacheError(
            f"torch.autocast is on for {kind!r} in {torch.get_autocast_dtype(kind)}: it computes "
            "in another dtype than the model's, so that keys and values are not those the chunk's "
            "key stands for. Compile and link outside of it; where an Accelerator"
            "(mixed_precision=...) has wrapped the model, give PIC the model as it was loaded "
            "(accelerator.unwrap_model(model, keep_fp32_wrapper=False)). To have the model in "
            f"that dtype, load it with dtype={torch.get_autocast_dtype(kind)}"
        )
