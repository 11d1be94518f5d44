"""How a model rotates keys by position, verified on the model itself.

Nothing is read from a table of model families. A token that is alone in its text attends only to
itself, so that its queries and keys at two positions differ by the rotation and by nothing else.
The rotation that takes those at one position to those at the other is the model's; a model for
which no known rotation does is refused.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from typing_extensions import override

from sparsity.errors import SparsityError
from sparsity.hf.forward_checks import WEIGHTS_AWAY
from sparsity.policies import Full
from sparsity.retention.layer import LayerRetention
from sparsity.retention.rotation import Move, Pairing, Rotation, unmoved

FAR = 2**20  # beyond what models are trained on: what changes with the length changes before that
# Tokens, and the two positions at which each goes through the model.
_TOKENS, _OLD = (5, 11, 17, 23, 29), (3, 150, 5, 91, 2)
_NEW = (77, FAR, FAR - 40, 8, FAR - 121)
# Relative error that a layer may add. Even a lone token depends on its position by rounding, which
# grows from layer to layer, so that a layer may double what is there.
_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_REMEDY = "use positions='absolute' with this model"


class Probed(Protocol):
    """What is asked of the cache through which a model is probed; see `sparsity.SparseCache`."""

    @property
    def retentions(self) -> dict[int, LayerRetention]:
        """What each managed layer holds, by the layer's index in the model."""
        ...

    def replace(self, retention: LayerRetention) -> None:
        """Use another retention for its layer; before the first forward."""
        ...


class Probe(LayerRetention):
    """A layer that records the queries and keys of its last forward.

    Attributes:
        seen: queries and keys, `[batch, heads, q, head_dim]` each.
    """

    seen: tuple[Tensor, Tensor]

    @override
    def attend(self, query: Tensor, key: Tensor, *args: Any, **scores: Any) -> Tensor:
        self.seen = query, key
        return super().attend(query, key, *args, **scores)


@dataclass(frozen=True)
class Angles:
    """A model's rotary module as a function: positions, int64 `[rows, n]`, to cosines and sines.

    Both are float32 `[rows, n, pairs]`.

    Args:
        module: the rotary module.
        layer_type: handed to the module, where angles differ by the type of layer.
        written: how the module writes the angle of each pair: "twice" all angles and all again,
            "doubled" each angle two times next to each other, "once".
    """

    module: nn.Module
    layer_type: str | None = None
    written: Literal["twice", "doubled", "once"] = "once"

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions, see the class."""
        buffers = (b for b in self.module.buffers() if not b.is_meta)
        device = next((b.device for b in buffers), positions.device)
        # The module answers in the dtype of its first argument.
        arguments: list[Any] = [torch.zeros(1, 1, device=device), positions.to(device)]
        arguments += [] if self.layer_type is None else [self.layer_type]
        out = self.module(*arguments)
        cos, sin = (out.real, out.imag) if isinstance(out, Tensor) else out
        if self.written == "twice":
            half = cos.shape[-1] // 2
            return cos[..., :half], sin[..., :half]
        return (cos[..., ::2], sin[..., ::2]) if self.written == "doubled" else (cos, sin)

    def __deepcopy__(self, memo: object) -> "Angles":
        """The same object: the module is the model's, and a copied cache has the same model."""
        return self


class Same:
    """Equal to another `Same` of the very same thing, as long as that thing is there."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, thing: object) -> None:
        self._thing = ref(thing)

    @override
    def __eq__(self, other: object) -> bool:
        thing = self._thing()
        return isinstance(other, Same) and thing is not None and thing is other._thing()


_PROVED: WeakKeyDictionary[nn.Module, tuple[object, dict[int, Move]]] = WeakKeyDictionary()
"""Of a decoder what `_likeness` said of it when it was looked at, and what was found."""


def moves_of(decoder: Any, new_cache: Callable[[], Probed]) -> dict[int, Move]:
    """`find_moves`, once for a model that stays as it is: it takes a forward.

    Args:
        decoder: of an attached model.
        new_cache: makes the cache for `find_moves`.
    """
    likeness = _likeness(decoder)
    known = _PROVED.get(decoder)
    if known is not None and known[0] == likeness:
        return known[1]
    moves = find_moves(decoder, new_cache())
    # Anew: a rotary module may note how far it was asked.
    _PROVED[decoder] = _likeness(decoder), moves
    return moves


def _rotary(decoder: Any) -> list[nn.Module]:
    """The rotary modules of a decoder."""
    return [m for m in decoder.modules() if type(m).__name__.endswith("RotaryEmbedding")]


def _likeness(decoder: Any) -> object:
    """What differs where the rotation may: rotary modules and their numbers, code, dtypes, config.

    The code is every module's `forward`, and what the files that they are from call rotary.
    """
    rotary = []
    for module in _rotary(decoder):
        numbers = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str)}
        buffers = [
            (Same(b), b.dtype, b.device, None if b.is_inference() else b._version)  # noqa: SLF001
            for b in module.buffers()
        ]
        rotary.append((Same(module), numbers, buffers))
    code = []
    for module in decoder.modules():
        forward = vars(module).get("forward", type(module).forward)
        code.append((type(module), Same(forward)))
    files = sorted({kind.__module__ for kind, _ in code})
    named = [
        (name, Same(value))
        for file in files
        for name, value in vars(sys.modules[file]).items()
        if "rotary" in name and callable(value)
    ]
    weights = {(p.dtype, p.device) for p in decoder.parameters()}
    return rotary, code, named, weights, _settings(decoder.config)


def _settings(config: PretrainedConfig) -> dict[str, object]:
    """What a configuration says, those inside it too, but for how it attends: that is `attach`'s.

    Anything may stand in one, and need not be comparable.
    """
    return {
        name: _settings(value) if isinstance(value, PretrainedConfig) else repr(value)
        for name, value in vars(config).items()
        if "attn_implementation" not in name
    }


def find_moves(decoder: Any, cache: Probed) -> dict[int, Move]:
    """How the keys of each managed layer are moved from one position to another.

    Five tokens, each alone and at two positions, go through the model once.

    Args:
        decoder: of an attached model.
        cache: a new cache of `Full()` for it, which is used up.

    Raises:
        SparsityError: where no known rotation explains what comes out.
    """
    layers = {layer: Probe(Full(), layer) for layer in cache.retentions}
    for probe in layers.values():
        cache.replace(probe)
    if not layers:
        return {}
    name = type(decoder).__name__
    angles = {layer: _angles(decoder, layer, name) for layer in layers}
    weight = decoder.get_input_embeddings().weight
    device = torch.device("cpu") if weight.is_meta else weight.device  # hooks bring what is away
    positions = torch.tensor([_OLD + _NEW], device=device).T
    with torch.no_grad():
        decoder(
            input_ids=torch.tensor([_TOKENS * 2], device=device).T,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
    old, new = positions[:, None].tensor_split(2)
    moves: dict[int, Move] = {}
    added, grown = 1e-4, 0.0
    for layer, probe in layers.items():
        added = _TOLERANCE.get(probe.seen[1].dtype, added)
        candidates: list[Move] = [unmoved]
        pairings: tuple[Pairing, ...] = ("half", "interleaved")
        if 2 * angles[layer](positions)[0].shape[-1] <= probe.seen[1].shape[-1]:
            candidates += [Rotation(angles[layer], pairing) for pairing in pairings]
        errors = [_error(probe.seen, move, old, new) for move in candidates]
        if not min(errors) <= added + 2 * grown:
            raise SparsityError(
                f"layer {layer} of {name}: no known rotation explains how its queries and keys "
                f"change with the position (relative error {min(errors):.1e}, at most "
                f"{added + 2 * grown:.0e} is accepted); {_REMEDY}"
            )
        grown = max(grown, min(errors))
        moves[layer] = candidates[errors.index(min(errors))]
    if all(move is unmoved for move in moves.values()):
        raise SparsityError(
            f"the positions given to {name} change nothing in its layers with full attention, so "
            f"that there are none to count inside the cache; {_REMEDY}"
        )
    return moves


def _angles(decoder: Any, layer: int, name: str) -> Angles:
    """The angles of a layer; SparsityError where there are none, or they change with the length."""
    modules = _rotary(decoder)
    if not modules:
        raise SparsityError(
            f"{name} has no rotary embedding module, so its keys cannot be moved; {_REMEDY}"
        )
    module = modules[0]
    types = getattr(decoder.config, "layer_types", None)
    takes = "layer_type" in inspect.signature(module.forward).parameters
    layer_type = types[layer] if takes and types else None
    plain = Angles(copy.deepcopy(module), layer_type)  # it may remember a long text
    try:
        short = plain(torch.tensor([[1, 2]]))[0]
        cos = plain(torch.tensor([[1, FAR]]))[0]
        again = plain(torch.tensor([[1, 2]]))[0]
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if any(buffer.is_meta for buffer in module.buffers()):
            raise SparsityError(WEIGHTS_AWAY) from error
        raise SparsityError(
            f"the rotary module of {name} does not take positions [rows, n] ({error}); {_REMEDY}"
        ) from error
    if not torch.equal(short[:, :1], cos[:, :1]) or not torch.equal(short, again):
        raise SparsityError(
            f"{name} rotates by other angles in a long text than in a short one (longrope, dynamic "
            f"NTK), so that a key does not keep its angle; {_REMEDY}"
        )
    half = cos.shape[-1] // 2
    if torch.equal(cos[..., :half], cos[..., half:]):
        return Angles(module, layer_type, "twice")
    if torch.equal(cos[..., ::2], cos[..., 1::2]):
        return Angles(module, layer_type, "doubled")
    return Angles(module, layer_type, "once")


def _error(seen: tuple[Tensor, ...], move: Move, old: Tensor, new: Tensor) -> float:
    """Relative error of queries and keys moved from old to new positions; median over tokens."""
    each = []
    for states in seen:
        before, after = states.float().tensor_split(2)
        heads = (-1, states.shape[1], -1)
        moved = move(before, old.expand(heads), new.expand(heads))
        each.append((moved - after).flatten(1).norm(dim=1) / after.flatten(1).norm(dim=1))
    return float(torch.maximum(*each).median())
