"""Switch a transformers model to one of our attention functions, and back again."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import RLock
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from picache.errors import PICacheError
from picache.hf.attention_functions import (
    Attached,
    attached,
    attend_parallel,
    attend_scattered,
    rotary_positions,
    scattered_mask,
)
from picache.hf.padded_pass import attend_padded, padded_mask

_SCATTERED = "picache_scattered"
_PADDED = "picache_padded"
_PARALLEL = "picache_parallel"
_locks: WeakKeyDictionary[PreTrainedModel, RLock] = WeakKeyDictionary()


class AttentionSwitch:
    """The attention function of one model: its own, or one of ours inside a ``with`` block.

    Args:
        model: the model; all switches of one model share a lock.
        decoder: the part of the model whose attention is switched.

    Attributes:
        turn: the lock. While attention is switched, no other thread may compile or link.
        key: the model's key in `picache.hf.attention_functions.attached`.
    """

    def __init__(self, model: PreTrainedModel, decoder: nn.Module) -> None:
        self._decoder = decoder
        self.turn = _locks.setdefault(model, RLock())
        self.key = id(decoder.config)

    def refuse_attached(self) -> None:
        """Raise PICacheError while a prompt is attached: the model then serves that one alone."""
        if self.key in attached:
            raise PICacheError(
                "this model is attached to a prompt: compile and link outside its block"
            )

    @property
    def own(self) -> str:
        """The implementation that the model attends by, as in `attn_implementation`."""
        config: Any = self._decoder.config
        return config._attn_implementation or "eager"  # noqa: SLF001 (there is no public reader)

    @property
    def goes_on(self) -> bool:
        """Whether the model's own attention goes on from a prefix in memory linear in its length.

        True of the kernels of flash attention, those of the Hub included, and flex_attention.
        """
        return self.own.startswith(("flash_attention", "flex_attention")) or "/" in self.own

    @contextmanager
    def unswitched(self) -> Iterator[None]:
        """Inside the block the model keeps its own attention; other threads that link wait."""
        with self.turn:
            self.refuse_attached()
            yield

    @contextmanager
    def scattered(self) -> Iterator[None]:
        """Inside the block the model runs a sparse pass; other threads that want to link wait."""
        with self._switched(_SCATTERED):
            yield

    @contextmanager
    def padded(self) -> Iterator[None]:
        """Inside the block the model runs a padded pass; other threads that want to link wait."""
        with self._switched(_PADDED):
            yield

    @contextmanager
    def parallel(self, prompt: Attached) -> Iterator[None]:
        """Inside the block the model decodes behind this batch of chunks side by side alone.

        Raises:
            PICacheError: when another prompt is attached.
        """
        if self.key in attached:
            raise PICacheError("another prompt is attached to this model: leave its block first")
        hook = self._decoder.register_forward_pre_hook(rotary_positions, with_kwargs=True)
        try:
            with self._switched(_PARALLEL) as configs:
                attached.update(dict.fromkeys([self.key, *configs], prompt))
                yield
        finally:
            for key in [key for key, one in attached.items() if one is prompt]:
                del attached[key]
            hook.remove()

    def attachment(self, prompt: Attached) -> "Attachment":
        """An object that attaches this linked batch to the model whenever it is called."""
        return Attachment(self, prompt)

    @contextmanager
    def _switched(self, name: str) -> Iterator[list[int]]:
        """Inside the block the model's configurations name our function; gives their ids."""
        with self.turn:
            AttentionInterface.register(_SCATTERED, attend_scattered)
            AttentionMaskInterface.register(_SCATTERED, scattered_mask)
            AttentionInterface.register(_PADDED, attend_padded)
            AttentionMaskInterface.register(_PADDED, padded_mask)
            AttentionInterface.register(_PARALLEL, attend_parallel)
            AttentionMaskInterface.register(_PARALLEL, eager_mask)
            self.refuse_attached()
            # Not asked for as attributes: a module looks long for one that it does not have.
            named = (vars(module).get("config") for module in self._decoder.modules())
            configs: dict[int, Any] = {id(c): c for c in named if c is not None}
            before = [(c, c._attn_implementation) for c in configs.values()]  # noqa: SLF001
            try:
                for config, _ in before:
                    config._attn_implementation = name  # noqa: SLF001
                yield list(configs)
            finally:
                for config, implementation in before:
                    config._attn_implementation = implementation  # noqa: SLF001


class Attachment:
    """Attaches one linked batch to its model, for the length of a ``with`` block.

    A copy attaches to the same model, which is not copied. Pickling is refused, since the model
    would have to go along.

    Args:
        attention: the switch of the model the batch was linked with.
        prompt: what decoding behind the batch must know.
    """

    def __init__(self, attention: AttentionSwitch, prompt: Attached) -> None:
        self._attention, self._prompt = attention, prompt

    def __call__(self) -> AbstractContextManager[None]:
        """A context manager: inside its block the model decodes behind this batch alone."""
        return self._attention.parallel(self._prompt)

    @property
    def on(self) -> bool:
        """Whether a prompt, this or another, is attached to the model now."""
        return self._attention.key in attached

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachment":
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PICacheError(
            "a prompt whose method is attached to the model while decoding (APE) cannot be "
            "written out, since its model is not part of it: keep the texts and a store with a "
            "path, and link again where the prompt is needed"
        )
