"""What must hold of a model and around its forwards while keys and values are made.

Dropout, autocast, weights that are elsewhere or another dtype change what a layer caches without
changing the weights that a chunk's key is made of. Each is refused by its own name, when `PIC` is
made, at every compile and link before anything is looked up, and inside the forward itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from picache.errors import PICacheError

_SAME_IN_BOTH = (nn.Linear, nn.Embedding)


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
class Made:
    """What a model was when `PIC` measured it, and must still be when chunks are compiled.

    Attributes:
        dtype: of its weights.
        quantised: what its weights are quantised by; empty where they are not.
    """

    dtype: torch.dtype
    quantised: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Made":
        """What the model is now."""
        return cls(model.dtype, quantised_by(model))


def refuse_ambient(model: PreTrainedModel, made: Made | None = None) -> None:
    """Raise PICacheError where keys and values made now would be others than the key says.

    Args:
        model: about to prefill or link.
        made: what it was when `PIC` was made; None when that is under way.
    """
    name = type(model).__name__
    _refuse_training(model, name)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    away = [where for where, tensor in tensors.items() if tensor.device.type == "meta"]
    if away:
        raise PICacheError(
            f"{len(away)} of the {len(tensors)} weights of {name} are not in memory (the first is "
            f"{away[0]!r}): they were offloaded to disk or to the CPU (device_map, accelerate's "
            "cpu_offload), or never loaded. What is not here cannot be told from other weights: "
            "load the whole model, on several devices if it fits none"
        )
    for kind in sorted({tensor.device.type for tensor in tensors.values()}):
        refuse_autocast(kind)
    if made is None:
        return
    now = Made.of(model)
    if now.dtype != made.dtype:
        raise PICacheError(
            f"{name} had weights in {made.dtype} when PIC was made of it and has {now.dtype} now: "
            "make a new PIC(model); chunks of the two are kept apart"
        )
    if now.quantised != made.quantised:
        raise PICacheError(
            f"{name} was {_quantised(made.quantised)} when PIC was made of it and is "
            f"{_quantised(now.quantised)} now: make a new PIC(model); chunks of the two are kept "
            "apart"
        )


def _refuse_training(model: PreTrainedModel, name: str) -> None:
    # Matrices, which resize_token_embeddings makes anew in training mode, are the same in both.
    modules = ((w, one) for w, one in model.named_modules() if type(one) not in _SAME_IN_BOTH)
    training = next((where for where, one in modules if one.training), None)
    if training is None:
        return
    what = f"module {training!r} of {name}" if training else name
    checkpointed = any(getattr(one, "gradient_checkpointing", False) for one in model.modules())
    also = ", and gradient checkpointing leaves out the cache" if checkpointed else ""
    raise PICacheError(
        f"{what} is in training mode, where dropout changes keys and values{also}: call "
        "model.eval() first"
    )


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


def quantised_by(model: PreTrainedModel) -> str:
    """What keeps a model's weights in fewer bits, as text; empty where nothing does."""
    quantizer = getattr(model, "hf_quantizer", None)  # set by transformers where it quantised
    if quantizer is not None:
        return type(quantizer).__name__
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for where, tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            return f"{type(tensor).__name__} ({where})"
        if tensor.dim() > 1 and tensor.itemsize == 1 and tensor.dtype != torch.bool:
            return f"{tensor.dtype} ({where})"
    packed = packed_weights(model)
    return f"{type(model.get_submodule(packed)).__name__} ({packed})" if packed else ""


def packed_weights(model: PreTrainedModel) -> str:
    """The first module that keeps its weights packed away from parameters and buffers."""
    for where, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            return where
    return ""


def refuse_packed(model: PreTrainedModel) -> None:
    """Raise PICacheError where weights are no tensors that a fingerprint sees."""
    packed = packed_weights(model)
    if packed:
        raise PICacheError(
            f"{type(model).__name__} keeps the weights of {packed!r} packed in a "
            f"{type(model.get_submodule(packed)).__name__} of {quantised_by(model)!r}, where they "
            "cannot be told from other weights, and most often quantises activations too, so that "
            "a token's keys depend on the tokens computed with it: load the model without "
            "quantisation, or quantise the weights alone"
        )


def _quantised(by: str) -> str:
    return f"quantised by {by}" if by else "not quantised"
