"""How a model is attached: its attention and mask functions, and the hooks that reach the cache."""

import inspect
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsity.arguments import check_instance
from sparsity.errors import SparsityError
from sparsity.hf.attention_function import KWARG, retention_attention, retention_mask
from sparsity.hf.fixed_memory import drop
from sparsity.hf.forward_checks import check_call
from sparsity.hf.generate_watch import unwatch, watch
from sparsity.hf.own_attention import forget, remember
from sparsity.hf.served_cache import ServedCache
from sparsity.policies.base import Policy

NAME = "kv_retention"  # of the attention function; names with "sdpa" or "flash" mean something


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
    config, given, mode, _, columns = args
    cache = given.get("past_key_values")
    if isinstance(cache, ServedCache):
        cache.generate_begins(config, mode, columns)
    elif config.cache_implementation in ("static", "offloaded_static") or (
        isinstance(cache, Cache) and type(cache) is not DynamicCache and cache.is_compileable
    ):
        raise SparsityError(
            "this model is attached, and generate was given a StaticCache, for which transformers "
            "makes masks that are not those of an attached model: call detach(model) first, or use "
            "a DynamicCache"
        )
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
        given = dict(zip(self.names, args, strict=False)) | kwargs
        cache, new = given.get("past_key_values"), given.get("input_ids")
        new = given.get("inputs_embeds") if new is None else new
        one = new is not None and new.shape[1] == 1 and given.get("attention_mask") is None
        if one and isinstance(cache, ServedCache) and cache.armed and cache.signature:
            cache.step_begins()
            return args, {**kwargs, KWARG: cache}
        return self._before(decoder, args, kwargs)

    @torch.compiler.disable
    def _before(self, decoder: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> Any:
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        cache = arguments.get("past_key_values")
        if not isinstance(cache, ServedCache):
            return None
        check_call(decoder, arguments)
        cache.begin(self.token, decoder, arguments)
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
        drop(decoder)
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


def _refuse_foreign(decoder: PreTrainedModel) -> str:
    """The implementation of a model; refused where neither transformers nor we have brought it.

    To replace it would change the model's results, or those of what has put it there for a while,
    such as a prompt that another thread links. It is read once: that thread may go on meanwhile.
    """
    name = _implementation(decoder)
    if name in ("eager", NAME) or "/" in name:  # the model's own, ours, a kernel of the Hub
        return name
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    module = inspect.getmodule(function)
    if module is not None and module.__name__.split(".")[0] != "transformers":
        raise SparsityError(
            f"{type(decoder).__name__} attends by {name!r}, which {module.__name__} registered: "
            "it would be replaced. If another thread put it there, as picache does while it links "
            "a prompt, share a lock between the two; else set one of transformers' own first, "
            'model.set_attn_implementation("sdpa")'
        )
    return name


def attach(model: PreTrainedModel) -> None:
    """Let `model` work with `SparseCache`; ``SparseCache(model, policy)`` does it by itself.

    Sets the model's attention function, adds hooks to its decoder, and puts a look at the prompt
    before its `prepare_inputs_for_generation`, where `generate` shows the whole text. Nothing else
    of the model changes: whole prompts, and all that goes through other caches, are still computed
    by the attention function that it had (with a `StaticCache` `generate` refuses an attached
    model). Calling it again does nothing.

    Args:
        model: a transformers model for text generation, written on the attention interface.

    Raises:
        SparsityError: for a model that is not supported, which is left as it was.
    """
    decoder = decoder_of(model)
    name, now = type(model).__name__, _refuse_foreign(decoder)
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
