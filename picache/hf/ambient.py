"""Conditions under which a model would make keys and values that a chunk's key does not stand for.

Dropout, autocast, offloaded weights or another dtype change what a layer caches, but not the hash
of the weights that is part of a chunk's key. Each is refused by its own name: when `PIC` is made,
at every compile and link before the store is asked, and inside the forward itself.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from picache.chunk import KV
from picache.errors import PICacheError
from picache.hf.fingerprint import PLAIN
from picache.hf.tensor_parallel import local

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
    """What a model's keys and values depend on; read in one walk over its modules.

    Attributes:
        modules: it and all in it, by name.
        weights: its parameters and then its buffers, by name; one that is tied stands there once.
        dtypes: of the parameters, by name.
        quantised: names what its weights are quantised by; empty where they are not.
        packed: the first module whose weights are neither parameters nor buffers; empty for none.
        training: the first module in training mode; None where all are in evaluation mode.
    """

    modules: tuple[tuple[str, nn.Module], ...]
    weights: tuple[tuple[str, Tensor], ...]
    dtypes: dict[str, torch.dtype]
    quantised: str
    packed: str
    training: str | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelState":
        """The state the model is in now."""
        quantised, packed, training = "", "", None
        parameters: dict[int, tuple[str, Tensor]] = {}
        buffers: dict[int, tuple[str, Tensor]] = {}
        modules = _named_modules(model)
        for where, module in modules:
            # Linear layers and embeddings do the same in both modes, and
            # resize_token_embeddings makes new ones in training mode.
            if training is None and module.training and type(module) not in _SAME_IN_TRAINING:
                training = where
            if not packed and type(module).__module__.startswith(_PACKING):
                packed, quantised = where, f"{type(module).__name__} ({where})"
            prefix = where and f"{where}."
            # named_parameters and named_buffers would walk the modules once more each.
            for found, held in ((parameters, module._parameters), (buffers, module._buffers)):  # noqa: SLF001
                for name, tensor in held.items():
                    if tensor is not None:
                        found.setdefault(id(tensor), (prefix + name, tensor))
        weights = (*parameters.values(), *buffers.values())
        quantised = next(filter(None, (_fewer_bits(*one) for one in weights)), quantised)
        quantizer = getattr(model, "hf_quantizer", None)  # set by transformers where it quantised
        if quantised and quantizer is not None:  # of a GGUF file the weights are plain again
            quantised = type(quantizer).__name__
        dtypes = {name: tensor.dtype for name, tensor in parameters.values()}
        return cls(modules, weights, dtypes, quantised, packed, training)

    def without_weights(self) -> "ModelState":
        """The same to compare with later, which keeps no weight in memory that is replaced."""
        return replace(self, modules=(), weights=())


def _named_modules(model: nn.Module) -> tuple[tuple[str, nn.Module], ...]:
    """What ``model.named_modules()`` gives, and faster: every link asks for it."""
    found: dict[int, tuple[str, nn.Module]] = {}
    left: list[tuple[str, nn.Module]] = [("", model)]
    while left:
        where, module = left.pop()
        if id(module) not in found:
            found[id(module)] = where, module
            inside = reversed(module._modules.items())  # noqa: SLF001 - attributes are slow
            prefix = where and f"{where}."
            left += [(prefix + name, child) for name, child in inside if child is not None]
    return tuple(found.values())


def _fewer_bits(name: str, tensor: Tensor) -> str:
    """Names the type of a quantised weight; empty for one that is not."""
    if type(tensor) in PLAIN and tensor.is_floating_point() and tensor.itemsize > 1:
        return ""  # as most are, and this is asked at every link
    tensor = local(tensor)
    if type(tensor) in PLAIN and tensor.is_floating_point() and tensor.itemsize > 1:
        return ""
    if is_traceable_wrapper_subclass(tensor):
        return f"{type(tensor).__name__} ({name})"
    packed = tensor.itemsize == 1 or not tensor.is_floating_point()  # int32 holds several (GPTQ)
    plain = tensor.dtype in (torch.bool, torch.int64)  # masks and indices
    return f"{tensor.dtype} ({name})" if tensor.dim() > 1 and packed and not plain else ""


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
    kinds = {tensor.device.type for _, tensor in now.weights}
    if "meta" in kinds:
        away = [where for where, tensor in now.weights if tensor.device.type == "meta"]
        raise PICacheError(
            f"{len(away)} of the {len(now.weights)} weights of {name} are not in memory (the first "
            f"is {away[0]!r}): they were offloaded to disk or to the CPU (device_map, "
            "accelerate's cpu_offload), or never loaded. What is not here cannot be told from "
            "other weights: load the whole model, on several devices if it fits none"
        )
    for kind in sorted(kinds):
        refuse_autocast(kind)
    if now.packed:
        raise PICacheError(
            f"{name} keeps the weights of {now.packed!r} packed in a "
            f"{type(model.get_submodule(now.packed)).__name__} quantised by torch, where they "
            "cannot be told from other weights, and most often quantises activations too, so that "
            "a token's keys depend on the tokens computed with it: load the model without "
            "quantisation, or quantise the weights alone"
        )
    if made is not None:
        _refuse_changes(name, made, now)
    return now


def _refuse_changes(name: str, made: ModelState, now: ModelState) -> None:
    """Raise PICacheError where a model is quantised or has a dtype otherwise than it had."""
    remedy = "make a new PIC(model); chunks of the two are kept apart"
    if now.quantised != made.quantised:
        before, after = (
            f"quantised by {one}" if one else "not quantised"
            for one in (made.quantised, now.quantised)
        )
        raise PICacheError(
            f"{name} was {before} when PIC was made of it and is {after} now: {remedy}"
        )
    if now.dtypes == made.dtypes:
        return
    for where, dtype in now.dtypes.items():  # those that are new, as of an adapter, may have any
        if (had := made.dtypes.get(where, dtype)) != dtype:
            raise PICacheError(
                f"{name} ({where}) had weights in {had} when PIC was made of it and has "
                f"{dtype} now: {remedy}"
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


def refuse_other_dtype(fed: KV, held: KV, holder: str) -> None:
    """Raise PICacheError where a forward makes keys or values in another dtype than is held."""
    for name, new, old in zip(("keys", "values"), fed, held, strict=True):
        if new.dtype != old.dtype:
            raise PICacheError(
                f"this forward makes {name} in {new.dtype}, {holder} them in {old.dtype}: run "
                "every forward outside of torch.autocast and with the model in the dtype it was "
                "linked in, or make a new PIC(model) and link again"
            )
