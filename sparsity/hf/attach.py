"""How a model is attached: its attention and mask functions, and the hooks that reach the cache."""

import inspect
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import PurePath
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsity.arguments import check_instance
from sparsity.errors import SparsityError
from sparsity.hf.autocast import lowered
from sparsity.hf.forward_checks import check_attention_dropout, check_call
from sparsity.hf.generate_watch import unwatch, watch
from sparsity.hf.layers import RetainedLayer
from sparsity.hf.own_attention import forget, own_attention, own_mask, remember
from sparsity.policies.base import Policy
from sparsity.retention.attention import attend
from sparsity.retention.lazy_mask import LazyMask

NAME = "kv_retention"  # of the attention function; names with "sdpa" or "flash" mean something
KWARG = "sparse_cache"  # how the cache reaches the attention function
_REFUSED = {"position_bias", "indices", "block_mask", "score_mod", "alibi", "attention_bias"}


class ServedCache(ABC):
    """What an attached model asks of its cache in a forward; implemented by `SparseCache`.

    Attributes:
        layers: of the cache, by index in the model.
        autocast: the dtype of `torch.autocast` in this forward; None where it is off.
        signature: all that an armed step depends on, see `sparsity.hf.compiled_step`.
    """

    layers: list[Any]
    autocast: torch.dtype | None
    signature: str

    @property
    @abstractmethod
    def armed(self) -> bool:
        """Whether the next forward is a step of decoding that was checked beforehand.

        Such a step is tensor operations only, and may be traced by torch.compile.
        """

    @abstractmethod
    def generate_begins(self, config: Any, mode: Any) -> None:
        """Check what `generate` is about to do.

        Args:
            config: the generation config of this call, which may be changed.
            mode: the generation mode, as transformers has it.
        """

    @abstractmethod
    def prepare(
        self, own: Callable[..., Any], input_ids: Tensor, args: tuple[Any, ...], kwargs: Any
    ) -> dict[str, Any]:
        """Prepare the inputs of a forward of `generate`, after a look at the whole text.

        Args:
            own: the model's `prepare_inputs_for_generation`.
            input_ids: the text so far, where a forward has only what is new.
            args: further arguments of `own`.
            kwargs: further arguments of `own`.
        """

    @abstractmethod
    def decode(
        self, layer: RetainedLayer, query: Tensor, key: Tensor, value: Tensor, **scores: Any
    ) -> Tensor:
        """Attention of one managed layer in an armed step."""

    @abstractmethod
    def stepped(self) -> None:
        """Close an armed step that has gone through."""

    @abstractmethod
    def begin(self, token: str, arguments: dict[str, Any]) -> None:
        """Check and plan a forward, before it has changed anything.

        Args:
            token: identifies the model.
            arguments: those that the decoder is called with, by name.
        """

    @abstractmethod
    def finish(self) -> None:
        """Close a forward that has gone through."""

    @abstractmethod
    def abandon(self) -> None:
        """Close a forward that has failed."""

    @abstractmethod
    def attend(
        self, layer: RetainedLayer, query: Tensor, key: Tensor, value: Tensor, **scores: Any
    ) -> Tensor:
        """Attention of one managed layer in the forward under way."""

    @abstractmethod
    def give_up(self, why: str) -> NoReturn:
        """Detach the model and raise SparsityError."""


def retention_mask(*args: Any, **kwargs: Any) -> LazyMask | None:
    """The mask function for transformers: keeps the rule as a `LazyMask`, makes no tensor.

    In a compiled step of decoding there is no mask: what is held is real, and older than the query.
    """
    if torch.compiler.is_compiling() and kwargs.get("mask_function") is causal_mask_function:
        return None
    return _lazy_mask(*args, **kwargs)


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
    return LazyMask(
        rule=None if mask_function is causal_mask_function else mask_function,
        padding=attention_mask,
        custom=use_vmap,
        dense=partial(sdpa_mask, **arguments),
        lengths=(q_length, kv_length),
        masks=partial(own_mask, arguments=arguments),
        plain=kwargs.get("allow_is_causal_skip", True),  # transformers' own word for it
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
    rule = attention_mask.rule if isinstance(attention_mask, LazyMask) else attention_mask
    if rule is not None:
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


def _prepare_inputs(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around a model's `prepare_inputs_for_generation`."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, ServedCache):
        return own(*args, **kwargs)
    given = dict(kwargs)
    ids, rest = (args[0], args[1:]) if args else (given.pop("input_ids"), ())
    return cache.prepare(own, ids, rest, given)


def _prepare_cache(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around a model's `_prepare_cache_for_generation`, the first that sees config and cache."""
    config, given, mode = args[:3]
    cache = given.get("past_key_values")
    if isinstance(cache, ServedCache):
        cache.generate_begins(config, mode)
    return own(*args, **kwargs)


_WATCHED = {
    "prepare_inputs_for_generation": _prepare_inputs,
    "_prepare_cache_for_generation": _prepare_cache,
}


class Attachment:
    """What attaching adds to a model: hooks of its decoder, and the check of its prompts."""

    def __init__(self, model: PreTrainedModel, decoder: PreTrainedModel, token: str) -> None:
        self.token = token
        self.names = tuple(inspect.signature(decoder.forward).parameters)
        self.previous = _implementation(decoder)
        self.handles = (
            decoder.register_forward_pre_hook(self.before, with_kwargs=True),
            decoder.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        )
        watch(decoder, model, _WATCHED)

    def before(self, decoder: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> Any:
        """Hook before a forward: check it, and hand the cache on to the attention function."""
        cache = kwargs.get("past_key_values")
        if isinstance(cache, ServedCache) and cache.armed and cache.signature:
            return args, {**kwargs, KWARG: cache}
        return self._before(decoder, args, kwargs)

    @torch.compiler.disable
    def _before(self, decoder: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> Any:
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        cache = arguments.get("past_key_values")
        if not isinstance(cache, ServedCache):
            return None
        check_call(decoder, arguments)
        cache.begin(self.token, arguments)
        return args, {**kwargs, KWARG: cache}

    def after(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Hook after a forward, or after its failure (then there is no output): close it."""
        cache = kwargs.get(KWARG)
        if cache is not None and cache.armed and output is not None:
            cache.stepped()
        elif cache is not None:
            self._after(cache, output)

    @torch.compiler.disable
    def _after(self, cache: ServedCache, output: Any) -> None:
        if output is None:
            cache.abandon()
        else:
            cache.finish()

    def undo(self, decoder: PreTrainedModel) -> None:
        """Remove hooks and prompt check, and restore the decoder's own attention function."""
        for handle in self.handles:
            handle.remove()
        unwatch(decoder)
        forget(decoder)
        if _implementation(decoder) == NAME:
            decoder.set_attn_implementation(self.previous)


ATTACHED: WeakKeyDictionary[PreTrainedModel, Attachment] = WeakKeyDictionary()
TOKENS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # outlive a detach


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of the model that has the layers, to which hooks are added.

    Raises:
        SparsityError: for a model that `SparseCache` cannot manage.
    """
    name = type(model).__name__
    check_instance(
        "model", model, PreTrainedModel, "a transformers model (a PreTrainedModel)", _remedy(model)
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


def _remedy(given: object) -> str:
    """What to do with what was handed in for a model."""
    if isinstance(given, str | PurePath):
        return f"; load it: AutoModelForCausalLM.from_pretrained({str(given)!r})"
    if isinstance(given, type):
        return f"; load one: {given.__name__}.from_pretrained(...)"
    if isinstance(given, Policy):
        return "; the model comes first: SparseCache(model, policy)"
    return "; for a wrapped model hand in the model inside" if isinstance(given, nn.Module) else ""


def _implementation(decoder: Any) -> str:
    return decoder.config._attn_implementation  # noqa: SLF001 (there is no public reader)


def _refuse_foreign(decoder: PreTrainedModel) -> None:
    """Refuse a model that attends by a function that neither transformers nor we have brought.

    To replace it would change the model's results, or those of what has put it there for a while,
    such as a prompt that another thread links.
    """
    name = _implementation(decoder)
    if name in ("eager", NAME) or "/" in name:  # the model's own, ours, a kernel of the Hub
        return
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    module = inspect.getmodule(function)
    if module is not None and module.__name__.split(".")[0] != "transformers":
        raise SparsityError(
            f"{type(decoder).__name__} attends by {name!r}, which {module.__name__} registered: "
            "it would be replaced. If another thread put it there, as picache does while it links "
            "a prompt, share a lock between the two; else set one of transformers' own first, "
            'model.set_attn_implementation("sdpa")'
        )


def attach(model: PreTrainedModel) -> None:
    """Let `model` work with `SparseCache`; ``SparseCache(model, policy)`` does it by itself.

    Sets the model's attention function, adds hooks to its decoder, and puts a look at the prompt
    before its `prepare_inputs_for_generation`, where `generate` shows the whole text. Nothing else
    of the model changes, and its results with other caches stay the same. Calling it again does
    nothing.

    Args:
        model: a transformers model for text generation, written on the attention interface.

    Raises:
        SparsityError: for a model that is not supported, which is left as it was.
    """
    decoder = decoder_of(model)
    name, now = type(model).__name__, _implementation(decoder)
    _refuse_foreign(decoder)
    attached = decoder in ATTACHED
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
    remember(decoder, now)
    if attached:  # the implementation was set anew in between: that is what to go back to
        ATTACHED[decoder].previous = now
        return
    token = TOKENS.setdefault(decoder, uuid.uuid4().hex)
    attachment = Attachment(model, decoder, token)
    attachment.previous = now
    ATTACHED[decoder] = attachment


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: the model is as it was. Does nothing to a model that is not attached.

    Raises:
        SparsityError: while the model attends by a function of somebody else, as when another
            thread links a prompt.
    """
    decoder = decoder_of(model)
    if decoder in ATTACHED:
        _refuse_foreign(decoder)
    if attachment := ATTACHED.pop(decoder, None):
        attachment.undo(decoder)


def is_attached(model: PreTrainedModel) -> bool:
    """Whether the model is attached."""
    return decoder_of(model) in ATTACHED


@contextmanager
def keep_attached(model: PreTrainedModel) -> Iterator[None]:
    """A context after which the model is attached, or not, as it was before."""
    before = is_attached(model)
    try:
        yield
    finally:
        if not before:
            detach(model)
