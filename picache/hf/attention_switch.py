"""The attention of a transformers model, switched to one of ours for a while."""

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

_SCATTERED = "picache_scattered"
_PARALLEL = "picache_parallel"
_locks: WeakKeyDictionary[PreTrainedModel, RLock] = WeakKeyDictionary()


class AttentionSwitch:
    """What a model attends by: its own function, or for the length of a block one of ours.

    Args:
        model: whose turns are taken: one lock a model, whoever wraps it.
        decoder: the part whose attention is switched.

    Attributes:
        turn: the lock. While attention is switched, no other thread may compile or link.
        key: under which `picache.hf.attention_functions.attached` knows this model.
    """

    def __init__(self, model: PreTrainedModel, decoder: nn.Module) -> None:
        self._decoder = decoder
        self.turn = _locks.setdefault(model, RLock())
        self.key = id(decoder.config)

    def refuse_attached(self) -> None:
        """Raise PICacheError while a prompt is attached: the model is for that one alone."""
        if self.key in attached:
            raise PICacheError(
                "this model is attached to a prompt: compile and link outside its block"
            )

    @contextmanager
    def scattered(self) -> Iterator[None]:
        """Rows of a sparse pass attend inside the block; another thread waits."""
        with self._switched(_SCATTERED):
            yield

    @contextmanager
    def parallel(self, state: Attached) -> Iterator[None]:
        """The model decodes behind chunks side by side inside the block, and nothing else.

        Raises:
            PICacheError: when another prompt is attached.
        """
        if self.key in attached:
            raise PICacheError("another prompt is attached to this model: leave its block first")
        hook = self._decoder.register_forward_pre_hook(rotary_positions, with_kwargs=True)
        try:
            with self._switched(_PARALLEL) as configs:
                attached.update(dict.fromkeys([self.key, *configs], state))
                yield
        finally:
            for key in [key for key, one in attached.items() if one is state]:
                del attached[key]
            hook.remove()

    def attachment(self, state: Attached) -> "Attachment":
        """What attaches the attention of one linked batch to this model; see `parallel`."""
        return Attachment(self, state)

    @contextmanager
    def _switched(self, name: str) -> Iterator[list[int]]:
        """Gives the ids of the configurations that name another function inside the block."""
        with self.turn:
            AttentionInterface.register(_SCATTERED, attend_scattered)
            AttentionMaskInterface.register(_SCATTERED, scattered_mask)
            AttentionInterface.register(_PARALLEL, attend_parallel)
            AttentionMaskInterface.register(_PARALLEL, eager_mask)
            self.refuse_attached()
            modules = self._decoder.modules()
            configs: dict[int, Any] = {
                id(m.config): m.config for m in modules if hasattr(m, "config")
            }
            before = [(c, c._attn_implementation) for c in configs.values()]  # noqa: SLF001
            try:
                for config, _ in before:
                    config._attn_implementation = name  # noqa: SLF001
                yield list(configs)
            finally:
                for config, implementation in before:
                    config._attn_implementation = implementation  # noqa: SLF001


class Attachment:
    """Attaches the attention of one linked batch to its model.

    A copy attaches to the same model, which is not copied; none leaves the process.

    Args:
        attention: of the model the batch was linked with.
        state: what it must know.
    """

    def __init__(self, attention: AttentionSwitch, state: Attached) -> None:
        self._attention, self._state = attention, state

    def __call__(self) -> AbstractContextManager[None]:
        """The model decodes behind this batch inside the ``with`` block, and nothing else."""
        return self._attention.parallel(self._state)

    @property
    def on(self) -> bool:
        """Whether a prompt is attached to the model now."""
        return self._attention.key in attached

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachment":
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PICacheError(
            "a prompt whose method is attached to the model while decoding (APE) cannot be "
            "written out, since its model is not part of it: keep the texts and a store with a "
            "path, and link again where the prompt is needed"
        )
