"""The state of one sparse pass: a forward of the model over a few tokens of the prompt alone.

Three parts of the model must know which tokens those are: the attention mask, which is evaluated at
their true positions; the cache, which writes their keys and values at those positions; and each
decoder layer, which must not be given tokens that the link method dropped before it.
"""

import inspect
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from picache.chunk import KV
from picache.errors import PICacheError
from picache.hf.attention import Block, bounds, mask_blocks

# Chooses again in each layer: given the layer, the positions of its tokens, their fresh KV and
# their reused KV, it returns the positions whose KV is replaced in this layer and those that go on
# to the next; or None, for all of them.
Narrow = Callable[[int, Tensor, KV, KV], tuple[Tensor, Tensor] | None]
Observe = Callable[[int, Tensor], None]  # told a layer and the attention mass of each token


CHANGED_MEANWHILE = (
    "not every layer attended by the function that linking sets: another thread changed it "
    "meanwhile (set_attn_implementation, or a SparseCache that was made), then share a lock "
    "between the two or give each thread a model of its own (copy.deepcopy(model)); or the "
    "attention of this model does not go through transformers' attention interface"
)
OTHER_THREAD = (
    "another thread links a prompt with this model, and its attention is switched "
    "meanwhile: a forward or generate of the same model object must wait. Share a lock "
    "between the two, or give each thread a model of its own (copy.deepcopy(model))"
)
_REFUSED = ("position_bias", "indices")  # arguments that change scores in ways not known here


class CannotCapture(Exception):  # noqa: N818 - no error: the pass runs in another way
    """Says why this pass cannot run in fixed shapes; the eager pass is exact where this is not."""


class KVByLayer(Protocol):
    """Keys and values of a whole prompt, layer by layer."""

    def __getitem__(self, layer: int, /) -> KV:
        """Keys and values ``[1, kv_heads, tokens, head_dim]`` of one layer."""
        ...


@dataclass(frozen=True)
class ScatterMask:
    """An attention mask given as a function of positions, evaluated for a few queries at a time.

    Attributes:
        function: transformers' mask function: whether attention is allowed, given the batch row,
            the head, the query's position and the key's position.
        positions: of the tokens of the pass, int64 ``[tokens]``, on their device.
        positions_on_cpu: the same, on the CPU, where reading them does not wait for the device.
    """

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    positions: Tensor
    positions_on_cpu: Tensor
    _kept: dict[tuple[int, torch.dtype], list[Block]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def blocks(self, keys: int, dtype: torch.dtype) -> Iterable[Block]:
        """The mask over a prompt of `keys` tokens, block by block; see `mask_blocks`.

        All layers of one kind are given the same mask: it is evaluated once for them, unless it has
        more elements than one block may have.
        """
        if (keys, dtype) in self._kept:
            return self._kept[keys, dtype]
        made = mask_blocks(self.positions, self.positions_on_cpu, self, keys, dtype)
        if keys * len(self.positions) > bounds(self.positions.device).elements:
            return made
        return self._kept.setdefault((keys, dtype), list(made))

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries at positions ``[q]`` may attend to keys at ``[n]``, bool ``[q, n]``."""
        zero = torch.zeros((), dtype=torch.int64, device=query.device)
        allowed = self.function(zero, zero, query[:, None], key[None, :])
        return allowed.expand(len(query), len(key))

    def to(self, *args: Any, **kwargs: Any) -> "ScatterMask":
        """The mask on the device of a layer; accelerate calls this on a layer's arguments."""
        return ScatterMask(self.function, self.positions.to(*args, **kwargs), self.positions_on_cpu)


class SparsePass:
    """What the mask, the cache and the decoder layers share during one sparse pass.

    Args:
        positions_on_cpu: of the tokens that enter the first layer, int64 ``[tokens]``, ascending,
            on the CPU.
        device: of the model.
        narrow: asked, once a layer has made its KV, which tokens go on; None to keep them all.
        observe: told each layer's attention mass, ``[tokens]``; None when nobody asks for it.
        value_norm: whether that mass is weighted by the norm of the values.
        stop: index of the layer before which the pass ends; None to run to the logits.
        parallel: which tokens belong to chunks side by side, and the factor on the log-sum-exp of
            the scores on them (APE); None when the chunks stand one after the other.

    Attributes:
        positions_on_cpu: of the tokens in the layer that is running, on the CPU.
        positions: the same on the device.
        entered: for each layer so far, the positions of the tokens that entered it, on the CPU.
        attended: how many layers so far attended by our function.
    """

    def __init__(
        self,
        positions_on_cpu: Tensor,
        device: torch.device,
        narrow: Narrow | None = None,
        observe: Observe | None = None,
        value_norm: bool = False,
        stop: int | None = None,
        parallel: tuple[slice, float] | None = None,
    ) -> None:
        self.positions_on_cpu, self.positions = positions_on_cpu, positions_on_cpu.to(device)
        self.narrow, self.observe = narrow, observe
        self.value_norm, self.stop, self.parallel = value_norm, stop, parallel
        self.entered: list[Tensor] = []
        self.attended = 0
        # Indices of the tokens that are left, among those that entered the first layer.
        self._left: Tensor | None = None
        # Indices of the tokens that go on to the next layer, among those of this layer.
        self._going_on: Tensor | None = None

    @property
    def layer(self) -> int:
        """Index of the layer that made its keys and values last; -1 before the first."""
        return len(self.entered) - 1

    @property
    def plain_tail(self) -> bool:
        """Whether the tokens are all those from some position on, to be attended to plainly.

        Nothing then needs a rule of ours: they go on from a prefix, as a text that is prefilled in
        parts does. The pass ends with the prompt.
        """
        positions = self.positions_on_cpu
        asked = (self.narrow, self.observe, self.stop, self.parallel)
        return asked == (None,) * 4 and int(positions[-1] - positions[0]) == len(positions) - 1

    def check_attended(self, cause: Exception | None = None) -> None:
        """Raise PICacheError unless every layer that made its KV attended by our function."""
        if self.attended != len(self.entered):
            raise PICacheError(CHANGED_MEANWHILE) from cause

    def replaced(self, fresh: KV, whole: KV) -> Tensor | None:
        """Ask `narrow` which of this layer's tokens have their KV replaced.

        Args:
            fresh: keys and values of the tokens, ``[1, kv_heads, tokens, head_dim]``.
            whole: those of the whole prompt, as reused so far.

        Returns:
            Indices among the layer's tokens, int64; None for all of them.
        """
        self.entered.append(self.positions_on_cpu)
        if self.narrow is None:
            return None
        reused = (whole[0][:, :, self.positions], whole[1][:, :, self.positions])
        chosen = self.narrow(self.layer, self.positions_on_cpu, fresh, reused)
        if chosen is None:
            return None
        entered = self.positions_on_cpu
        kept, going_on = (torch.isin(entered, one).nonzero().flatten() for one in chosen)
        self._going_on = going_on
        return kept.to(self.positions.device)

    def arguments(self, module: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a decoder layer, without the tokens that were dropped before it."""
        left = dict(given)
        if self._going_on is not None:
            going_on = self._going_on.to(self.positions.device)
            left["hidden_states"] = given["hidden_states"][:, going_on]
            self._left = going_on if self._left is None else self._left[going_on]
            self.positions_on_cpu = self.positions_on_cpu[self._going_on]
            self.positions = self.positions[going_on]
            self._going_on = None
        if self._left is None:
            return left
        for name, value in given.items():
            if isinstance(value, ScatterMask):
                left[name] = ScatterMask(value.function, self.positions, self.positions_on_cpu)
            elif name == "position_embeddings":
                left[name] = tuple(part[:, self._left] for part in value)
            elif name in ("position_ids", "cache_position"):
                left[name] = value[..., self._left]
            elif isinstance(value, Tensor) and name != "hidden_states":
                raise PICacheError(
                    f"{type(module).__name__} is given {name!r} token by token, which a method "
                    "that drops tokens between layers does not know: choose one that keeps them, "
                    "such as LegoLink"
                )
        return left


@dataclass(frozen=True)
class Question:
    """What a pass is asked for in place of its logits: how much its rows attend to each place.

    Attributes:
        layers: how many of the first layers it runs.
        value_norm: whether attention is weighted by the norm of the value it is paid to.
    """

    layers: int
    value_norm: bool


class Stop(Exception):  # noqa: N818 - not an error: the pass has gone far enough
    """Ends a pass that needs only the first layers."""


current: ContextVar[SparsePass] = ContextVar("picache_pass")
"""The pass that is running in this thread."""


def under_way() -> SparsePass:
    """The sparse pass that this thread runs.

    Raises:
        PICacheError: when there is none, since the model's attention is switched for the pass of
            another thread.
    """
    running = current.get(None)
    if running is None:
        raise PICacheError(OTHER_THREAD)
    return running


def refuse_unknown_scores(module: nn.Module, arguments: dict[str, Any]) -> None:
    """Raise PICacheError where attention is given an argument that changes its scores."""
    for name in _REFUSED:
        if arguments.get(name) is not None:
            raise PICacheError(
                f"{type(module).__name__} changes its attention scores through {name!r}, which "
                "linking does not know: use a full prefill with this model"
            )


def enter_layer(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of every decoder layer in a pass that may drop tokens or end early."""
    running = under_way()
    if running.stop == running.layer + 1:
        raise Stop
    names = list(inspect.signature(module.forward).parameters)
    return (), running.arguments(module, dict(zip(names, args, strict=False)) | kwargs)
