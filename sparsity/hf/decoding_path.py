"""How single tokens are decoded: in a compiled step, or one operation after the other, and why."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationMode

from sparsity.errors import SparsityError
from sparsity.hf.layers import RetainedLayer
from sparsity.hf.tensor_parallel import tensor_rank
from sparsity.kernels.available import why_not
from sparsity.retention.fixed_pool import places_of

COMPILED = "in one compiled step, in memory of fixed size"
_ASKED = "static=False"
_ON_CPU = "the model is not on a CUDA device"


def choose_places(
    model: PreTrainedModel,
    decoder: PreTrainedModel,
    layers: list[Any],
    max_tokens: int | None,
    static: bool | None,
) -> tuple[dict[int, int], str | None]:
    """Places for pages of each managed layer, where memory is of fixed size.

    Args:
        model: that decodes.
        decoder: its decoder.
        layers: of the cache.
        max_tokens: columns that a text may have; None for no bound.
        static: see `SparseCache`.

    Returns:
        The places by the layer's index in the model, empty where memory grows; and why steps are
        not compiled, None where they are.

    Raises:
        SparsityError: where `static` is True and memory cannot be of fixed size.
    """
    if static not in (None, True, False):
        raise SparsityError(f"static={static!r}: expected True, False or None")
    if static is False:
        return {}, _ASKED
    why = _why_it_grows(model, decoder, layers, max_tokens)
    weights = next(decoder.parameters())
    if why is None and weights.is_cuda:
        why = _no_kernel(decoder.config, layers[0].retention.policy.page_size, weights)
    elif why is None and static is None:
        why = _ON_CPU
    if why is not None:
        if static:
            raise SparsityError(f"static=True, and memory cannot be of fixed size, since {why}")
        return {}, why
    places = {}
    for layer in layers:
        most = places_of(layer.retention.policy, max_tokens)
        assert most is not None
        places[layer.retention.layer] = most
    return places, None


def _why_it_grows(
    model: PreTrainedModel, decoder: PreTrainedModel, layers: list[Any], max_tokens: int | None
) -> str | None:
    """Why memory cannot be of fixed size, or the step not be one graph; None if it can."""
    stock = [i for i, layer in enumerate(layers) if not isinstance(layer, RetainedLayer)]
    if stock:
        kind = type(layers[stock[0]]).__name__
        return f"layer {stock[0]} is a {kind}, which transformers manages and which grows"
    if not layers:
        return "the model has no layer with full attention"
    for layer in layers:
        policy = layer.retention.policy
        if places_of(policy, max_tokens) is None:
            return f"{policy} does not bound what layer {layer.retention.layer} holds; max_tokens=N"
    if not decoder._can_compile_fullgraph:  # noqa: SLF001 (there is no public reader)
        return f"transformers does not compile a {type(decoder).__name__} into one graph"
    if tensor_rank(model) is not None:
        return "tensor parallelism shares each layer out over processes"
    places = set(getattr(model, "hf_device_map", {}).values())
    if len(places) > 1 or places & {"cpu", "disk"}:
        return "the model is spread over several devices, or offloaded"
    if _rotation_changes(decoder.config):
        return "the model's rotary embedding changes with the length of the text"
    return None


def _no_kernel(config: Any, page_size: int, weights: Tensor) -> str | None:
    """Why the kernels of a step cannot serve a model on a CUDA device; None if they can."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return why_not(weights.device, weights.dtype, head_dim, head_dim, page_size)


def _rotation_changes(config: Any) -> bool:
    """Whether the rotary embedding depends on how long the text is (dynamic NTK, LongRoPE)."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [given, *(value for value in given.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def why_not_compiled(config: Any, mode: Any) -> str | None:
    """Why a call of `generate` does not compile its steps; None if it does.

    Args:
        config: the generation config of the call.
        mode: its generation mode.
    """
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"the generation mode is {mode.value}"
    if config.disable_compile:
        return "disable_compile is set"
    if config.prefill_chunk_size is not None:
        return "prefill_chunk_size is set, with which transformers would compile the prompt"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            return f"{name} is set"
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return "torch.autocast is on"
    return None
