"""A model's own rotary module: its cos and sin, and whether they depend on the text's length."""

import copy
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from picache.errors import PICacheError
from picache.hf.rope import Angles


class RotaryModule:
    """A model's rotary module, asked for cos and sin.

    In some kinds of RoPE (dynamic NTK, longrope) the frequencies depend on the length of the text,
    and the module keeps those of the last text it saw. Questions about another length are therefore
    put to a copy of it.

    Args:
        module: the model's rotary module.
        config: configuration of the decoder; it lists the layer types, where frequencies differ by
            type.
        name: class name of the model, for error messages.

    Attributes:
        follows_length: whether the frequencies depend on the length of the text; known once
            `detect_length_dependence` has run.
    """

    def __init__(self, module: nn.Module, config: Any, name: str) -> None:
        self._module, self._name = module, name
        types: list[str] | None = getattr(config, "layer_types", None)
        takes = "layer_type" in inspect.signature(module.forward).parameters
        self._types = types if types and takes else None
        self._layers: list[int] = []  # one of each layer type that is rotated
        self._short = torch.empty(0)  # the rotation in a text of two tokens
        self.follows_length = False

    def detect_length_dependence(self, rotated: Sequence[int], far: int) -> None:
        """Detect RoPE whose frequencies depend on the length of the text (dynamic NTK, longrope).

        Sets `follows_length`.

        Args:
            rotated: indices of the layers that rotate what they cache.
            far: the length, in tokens, that is compared with a text of two tokens.
        """
        self._layers = list({self.layer_type(layer): layer for layer in rotated}.values())
        self._short = self._in_a_text_of(2)
        self.follows_length = not torch.equal(self._short, self._in_a_text_of(far))

    def layer_type(self, layer: int) -> str | None:
        """The type of a layer, such as "sliding_attention"; None where all rotate alike."""
        return None if self._types is None else self._types[layer]

    def length_dependent_buffers(self) -> list[Tensor]:
        """The buffers that a forward may overwrite with the frequencies of its text's length."""
        return list(self._module.buffers()) if self.follows_length else []

    def cos_sin(self, layer: int, positions: Tensor, module: nn.Module | None = None) -> Angles:
        """cos and sin as the module gives them, each fp32 ``[tokens, d]``.

        Args:
            layer: index of the layer.
            positions: rotary positions, ``[tokens]``.
            module: a copy of the module to ask; None for the module itself.

        Raises:
            PICacheError: when the module does not take such positions.
        """
        module = module or self._module
        device = next((b.device for b in module.buffers()), positions.device)
        # An fp32 input keeps the result in fp32.
        arguments: list[object] = [torch.zeros(1, 1, device=device), positions[None].to(device)]
        if self._types is not None:
            arguments.append(self._types[layer])
        try:
            out = module(*arguments)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise PICacheError(
                f"the rotary module of {self._name} does not take positions of shape "
                f"{tuple(positions[None].shape)} ({type(error).__name__}: {error}): its rotation "
                "cannot be measured, use a full prefill with this model"
            ) from error
        cos, sin = (out.real, out.imag) if isinstance(out, Tensor) else out
        return cos[0].float(), sin[0].float()

    def _in_a_text_of(self, length: int) -> Tensor:
        """cos and sin at position 1 in a text of `length` tokens, of every kind of layer."""
        module, positions = copy.deepcopy(self._module), torch.tensor([1, length - 1])
        seen = []
        for layer in self._layers:
            self.cos_sin(layer, torch.tensor([0]), module)  # back to the short ones, if it can
            seen.append(torch.cat(self.cos_sin(layer, positions, module), dim=1)[0])
        return torch.cat(seen) if seen else torch.empty(0)

    def restore_short(self) -> None:
        """Bring back the frequencies of short texts, if a longer text has replaced them.

        Raises:
            PICacheError: when the module does not go back.
        """
        if not self.follows_length:
            return
        for layer in self._layers:
            self.cos_sin(layer, torch.tensor([0]))
        if not torch.equal(self._in_a_text_of(2), self._short):
            raise PICacheError(
                f"{self._name} still rotates keys with the frequencies of a longer text it was "
                "given before (a dynamic RoPE that does not go back, in some releases of "
                "transformers): load the model again, and give it no longer text"
            )

    def check(self, compiled: Iterable[int], total: int) -> None:
        """Refuse to link chunks that were compiled with other frequencies than the prompt has.

        Args:
            compiled: tokens of each chunk as compiled, sinks included.
            total: tokens of the linked prompt.

        Raises:
            PICacheError: when the frequencies follow the length and differ between the two.
        """
        if not self.follows_length:
            return
        self.restore_short()
        for length in sorted(set(compiled)):
            if not torch.equal(self._in_a_text_of(length), self._in_a_text_of(total)):
                raise PICacheError(
                    f"{self._name} rotates keys with other frequencies in a prompt of {total} "
                    f"tokens than in a chunk compiled with {length}: its RoPE follows the length "
                    f"(longrope, dynamic). Link at most {self._longest(length, total)} tokens, or "
                    "use a full prefill"
                )

    def _longest(self, same: int, other: int) -> int:
        """The longest text, in tokens, with the frequencies of a text of `same`; by bisection."""
        while other - same > 1:
            middle = (same + other) // 2
            alike = torch.equal(self._in_a_text_of(same), self._in_a_text_of(middle))
            same, other = (middle, other) if alike else (same, middle)
        return same
