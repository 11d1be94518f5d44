"""The state of one sparse pass: which rows are under way, and how rows are left behind.

A model's own forward runs with a few rows instead of the whole prompt. Three places need to know
which rows those are: the mask (evaluated at their true positions), the cache (which writes their
KV in place) and each decoder layer (which must not be given rows that were dropped before it).
"""

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from picache.chunk import KV
from picache.errors import PICacheError

# (layer, positions of its rows, their fresh KV, their held KV) to the positions whose KV is
# replaced in this layer and those that go on to the next; None for all.
Narrow = Callable[[int, Tensor, KV, KV], tuple[Tensor, Tensor] | None]
Observe = Callable[[int, Tensor], None]


class Layers(Protocol):
    """Keys and values of a whole prompt by layer."""

    def __getitem__(self, layer: int, /) -> KV:
        """Keys and values ``[1, kv_heads, tokens, head_dim]`` of one layer."""
        ...


@dataclass(frozen=True)
class ScatterMask:
    """A mask that is not made yet: an index function, to be asked at true positions.

    Attributes:
        function: allowed, of (batch, head, query position, key position).
        positions: of the rows, int64 ``[rows]``, on their device.
        known: the same, on the CPU: what is decided by them need not wait for the device.
    """

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    positions: Tensor
    known: Tensor

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Allowed, bool ``[q, n]``, at positions ``[q]`` and ``[n]``."""
        zero = torch.zeros((), dtype=torch.int64, device=query.device)
        allowed = self.function(zero, zero, query[:, None], key[None, :])
        return allowed.expand(len(query), len(key))

    def to(self, *args: Any, **kwargs: Any) -> "ScatterMask":
        """Follow a layer to its device, as accelerate asks of arguments."""
        return ScatterMask(self.function, self.positions.to(*args, **kwargs), self.known)


class Pass:
    """What one sparse pass shares between the mask, the cache layers and the decoder layers.

    Args:
        known: positions of the rows that enter, int64 ``[rows]``, ascending, on the CPU.
        device: of the model.
        narrow: asked for fewer rows once a layer's KV is made; None to keep them all.
        observe: told (layer, attention mass ``[tokens]``); None when nobody asks.
        value_norm: whether that mass is weighed by the length of the values.
        stop: the layer before which the pass ends; None to run to the logits.
        parallel: the rows of chunks side by side and the scale of attention to them; None when the
            chunks stand one after the other.

    Attributes:
        known: positions of the rows in the layer under way, on the CPU.
        positions: the same on the device.
        entered: the positions that went through each layer so far, on the CPU.
    """

    def __init__(
        self,
        known: Tensor,
        device: torch.device,
        narrow: Narrow | None = None,
        observe: Observe | None = None,
        value_norm: bool = False,
        stop: int | None = None,
        parallel: tuple[slice, float] | None = None,
    ) -> None:
        self.known, self.positions = known, known.to(device)
        self.narrow, self.observe = narrow, observe
        self.value_norm, self.stop, self.parallel = value_norm, stop, parallel
        self.entered: list[Tensor] = []
        self._left: Tensor | None = None  # indices, among the rows that entered, of those left
        self._going_on: Tensor | None = None  # indices, in this layer, of those for the next

    @property
    def layer(self) -> int:
        """Index of the layer whose KV was made last."""
        return len(self.entered) - 1

    def replaced(self, fresh: KV, held: KV) -> Tensor | None:
        """Indices of this layer's rows whose fresh KV replaces what is held; None for all.

        Args:
            fresh: keys and values of the rows, ``[1, kv_heads, rows, head_dim]``.
            held: those of the whole prompt.
        """
        self.entered.append(self.known)
        if self.narrow is None:
            return None
        stale = (held[0][:, :, self.positions], held[1][:, :, self.positions])
        chosen = self.narrow(self.layer, self.known, fresh, stale)
        if chosen is None:
            return None
        kept, going_on = (torch.isin(self.known, one).nonzero().flatten() for one in chosen)
        self._going_on = going_on
        return kept.to(self.positions.device)

    def arguments(self, module: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """A decoder layer's arguments, less the rows that were dropped before it."""
        left = dict(given)
        if self._going_on is not None:
            going_on = self._going_on.to(self.positions.device)
            left["hidden_states"] = given["hidden_states"][:, going_on]
            self._left = going_on if self._left is None else self._left[going_on]
            self.known = self.known[self._going_on]
            self.positions = self.positions[going_on]
            self._going_on = None
        if self._left is None:
            return left
        for name, value in given.items():
            if isinstance(value, ScatterMask):
                left[name] = ScatterMask(value.function, self.positions, self.known)
            elif name == "position_embeddings":
                left[name] = tuple(part[:, self._left] for part in value)
            elif name in ("position_ids", "cache_position"):
                left[name] = value[..., self._left]
            elif isinstance(value, Tensor) and name != "hidden_states":
                raise PICacheError(
                    f"{type(module).__name__} is given {name!r} row by row, which a method that "
                    "drops rows between layers does not know: choose one that keeps its rows, "
                    "such as LegoLink"
                )
        return left


class Stop(Exception):  # noqa: N818 - not an error: the pass has gone far enough
    """Ends a pass that needs only the first layers."""


current: ContextVar[Pass] = ContextVar("picache_pass")


def under_way() -> Pass:
    """The pass that this thread runs.

    Raises:
        PICacheError: when the model's attention is switched for a pass of another thread.
    """
    state = current.get(None)
    if state is None:
        raise PICacheError(
            "another thread links or compiles with this model, and its attention is switched "
            "meanwhile: a forward or generate of the same model object must wait. Share a lock "
            "between the two, or give each thread a model of its own (copy.deepcopy(model))"
        )
    return state


def enter_layer(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of every decoder layer in a pass that may drop rows or end early."""
    state = under_way()
    if state.stop == state.layer + 1:
        raise Stop
    names = list(inspect.signature(module.forward).parameters)
    return (), state.arguments(module, dict(zip(names, args, strict=False)) | kwargs)
