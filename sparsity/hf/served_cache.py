"""What an attached model asks of its cache; implemented by `SparseCache`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsity.hf.layers import RetainedLayer


class ServedCache(ABC):
    """What an attached model asks of its cache, in `generate` and in a forward.

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
    def generate_begins(self, config: Any, mode: Any, columns: int) -> None:
        """Check what `generate` is about to do.

        Args:
            config: the generation config of this call, which may be changed.
            mode: the generation mode, as transformers has it.
            columns: of the text that need a place by then, at most.
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
    def step_begins(self) -> None:
        """Open an armed step."""

    @abstractmethod
    def stepped(self) -> None:
        """Close an armed step that has gone through."""

    @abstractmethod
    def begin(self, token: str, decoder: PreTrainedModel, arguments: dict[str, Any]) -> None:
        """Check and plan a forward, before it has changed anything.

        Args:
            token: identifies the model.
            decoder: of it, which is called.
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
