"""The self-check of a model: linking must reproduce the model's own prefill, or is refused.

`picache.hf.rope.calibrate` proves the rotation on single tokens. Whatever else linking relies on is
tried here, once per model, on a short random prompt: that a chunk can be moved to other positions,
that attention obeys the mask of scattered tokens, and that nothing a later token needs is kept
outside the cached keys and values.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from picache.chunk import KV
from picache.errors import PICacheError
from picache.hf.rope import difference, relative_errors, rotate

if TYPE_CHECKING:
    from picache.hf.model import HFModel

# The relative error that a layer may add, and the share of tokens that must keep within it.
# Rounding grows from layer to layer: a layer may double the error of the layers before it. In half
# precision a token may reach another expert of a mixture. A wrong mask or a lost state gives an
# error near 1.
_TOLERANCE = {
    torch.float64: (1e-4, 1.0),
    torch.float32: (1e-4, 1.0),
    torch.float16: (3e-3, 0.5),
    torch.bfloat16: (2e-2, 0.5),
}
_FLIP = 0.25  # error of half-precision logits when the last token reaches another expert
_TOKENS = 24
_LONGEST_WINDOW = 256  # a window up to here is made shorter than the prompt of the check
_CHUNK = slice(5, 12)
_FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def check(model: "HFModel") -> None:
    """Link a short random prompt and compare it with the model's own prefill.

    It costs forwards of about 75 tokens in all, more where the attention window is below 256
    tokens.

    Raises:
        PICacheError: at the first layer that deviates; says by how much, and what to do.
    """
    window = model.window if model.window and model.window <= _LONGEST_WINDOW else 0
    tokens = min(_TOKENS + window, model.max_length or _TOKENS + window)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (tokens,), generator=generator)
    with model.on_trial():
        if tokens >= _CHUNK.stop:
            _check_moving(model, ids[_CHUNK])
        _check_scattered(model, ids)


def _check_moving(model: "HFModel", ids: Tensor) -> None:
    """Check that a chunk prefilled at position 0 and moved equals one prefilled over there."""
    moved = []
    old = torch.arange(len(ids))
    for layer, (kv, rotation) in enumerate(
        zip(model.prefill(ids[None]), model.rotations, strict=True)
    ):
        parts = list(kv)
        if rotation is not None:
            new = old + _CHUNK.start
            turn = difference(model.angles(layer, old), model.angles(layer, new))
            part = parts[rotation.part]
            parts[rotation.part] = rotate(part, turn, rotation.pairing, rotation.offset)
        moved.append((parts[0], parts[1]))
    there = model.prefill(ids[None], _CHUNK.start)
    _compare(model, "a chunk moved to other positions", moved, there)


def _check_scattered(model: "HFModel", ids: Tensor) -> None:
    """Check that tokens erased from a full prefill are recomputed as they were.

    The logits must be those of the model without a cache.
    """
    tokens = len(ids)
    position = torch.arange(tokens)
    behind = tokens - 1 - position
    late = (behind < _TOKENS) & ((behind % 5 == 0) | (behind % 5 == 2) | (behind % 5 == 3))
    # Few of the early tokens: most are past the window.
    early = (position < _TOKENS) & (behind >= _TOKENS) & (position % 5 == 1)
    chosen = position[early | late]  # the last token, but not the one before it
    whole = model.prefill(ids[None])
    kv = [(keys.clone(), values.clone()) for keys, values in whole]
    for tensor in (tensor for layer in kv for tensor in layer):
        tensor[:, :, chosen] = torch.nan  # a key read before it is recomputed gives NaN
    try:
        logits, _ = model.scattered_forward(ids[chosen], chosen, kv)
    except _FAILURES as error:
        if isinstance(error, PICacheError):
            raise
        raise PICacheError(
            f"self-check of {type(model.model).__name__}: its forward over scattered rows failed "
            f"({type(error).__name__}: {error}); its attention does not go through transformers' "
            "attention interface as others do, use a full prefill with this model"
        ) from error
    what = "tokens recomputed at scattered positions"
    recomputed = [(keys[:, :, chosen], values[:, :, chosen]) for keys, values in kv]
    prefilled = [(keys[:, :, chosen], values[:, :, chosen]) for keys, values in whole]
    _compare(model, what, recomputed, prefilled)
    last_layers = zip(recomputed[-1], prefilled[-1], strict=True)
    last = [relative_errors(a, b, dim=-2)[-1] for a, b in last_layers]
    # The logits belong to the last token: the error it has grown to counts, and a change of expert.
    flip = _FLIP if logits.dtype in (torch.float16, torch.bfloat16) else 0.0
    grown = max(flip, float(torch.stack(last).max()))
    right = model.logits(ids[None])
    with model.agreed():
        _refuse_deviation(model, f"logits after {what}", logits, right, grown)


def _compare(model: "HFModel", what: str, actual: list[KV], expected: list[KV]) -> None:
    """Compare keys and values of every layer; PICacheError at the first that deviates."""
    grown = 0.0
    with model.agreed():
        for layer, (found, right) in enumerate(zip(actual, expected, strict=True)):
            errors = [
                _refuse_deviation(model, f"layer {layer}: {name} of {what}", a, b, grown)
                for name, a, b in zip(("keys", "values"), found, right, strict=True)
            ]
            grown = max(grown, *errors)


def _refuse_deviation(
    model: "HFModel", what: str, actual: Tensor, expected: Tensor, grown: float
) -> float:
    """The relative error of `actual`; PICacheError when it is over the bound.

    The bound is the tolerance of the dtype, and twice the error that earlier layers had `grown` to.
    """
    added, part = _TOLERANCE[expected.dtype]
    bound = added + 2 * grown
    errors = relative_errors(actual, expected, dim=-2).nan_to_num(torch.inf)
    error = float(errors.quantile(part, interpolation="lower"))
    if error > bound:
        raise PICacheError(
            f"self-check of {type(model.model).__name__}: {what} deviate from the model's own "
            f"prefill by {error:.1e} relative (at most {bound:.0e} is accepted), so linking would "
            "be silently wrong: use a full prefill with this model, or load it with "
            "attn_implementation='eager' if its attention leaves out a softcap or sinks otherwise"
        )
    return error
