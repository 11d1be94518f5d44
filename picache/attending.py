"""Attention as a model's layers call it, while a prompt is linked and behind one with APE.

Both have the signature of transformers' attention interface; `picache.hf` registers them.
"""

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from picache.attention import attention_mass, parallel_attention, scattered_attention
from picache.errors import PICacheError
from picache.sparse_pass import ScatterMask, current

_REFUSED = ("position_bias", "indices")  # arguments that change scores in ways not known here

# Which keys of a batch are side by side, bool [batch, tokens], and the scale of attention to them.
decoding: ContextVar[tuple[Tensor, float] | None] = ContextVar("picachedecoding", default=None)


def scattered_mask(mask_function: Callable, **_: object) -> ScatterMask:
    """The mask of the pass under way, not made yet."""
    return ScatterMask(mask_function, current.get().positions)


def attend_scattered(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ScatterMask,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The rows of the pass under way over the whole prompt's keys, causal by position."""
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise PICacheError(
                f"{type(module).__name__} changes its attention scores through {name!r}, which "
                "linking does not know: use a full prefill with this model"
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    positions, state = attention_mask.positions, current.get()
    if state.parallel is not None:
        rows, factor = state.parallel
        everything = torch.arange(key.shape[2], device=key.device)
        allowed, causal = attention_mask(positions, everything), everything <= positions[:, None]
        if s_aux is not None or not torch.equal(allowed, causal):
            raise PICacheError(
                f"{type(module).__name__} attends through a window or with sinks, which chunks "
                "side by side (APE) do not go with: choose a method that places them in order"
            )
        inside = torch.zeros(1, key.shape[2], dtype=torch.bool, device=key.device)
        inside[:, rows] = True
        out = parallel_attention(
            query, key, value, allowed[None, None], inside, scale, factor, softcap
        )
        return out.transpose(1, 2).contiguous(), None
    out = scattered_attention(query, key, value, positions, attention_mask, scale, softcap, s_aux)
    if state.observe is not None:
        norms = value.norm(dim=-1, keepdim=True) if state.value_norm else None
        mass = attention_mass(query, key, positions, attention_mask, scale, softcap, s_aux, norms)
        state.observe(state.layer, mass)
    return out.transpose(1, 2).contiguous(), None


def attend_parallel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """While decoding behind chunks side by side; `attention_mask` is additive, 0 where allowed."""
    state = decoding.get()
    assert state is not None
    inside, factor = state
    inside = inside.repeat_interleave(len(key) // len(inside), dim=0)  # beams, several sequences
    inside = nn.functional.pad(inside, (0, key.shape[2] - inside.shape[1]))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = parallel_attention(query, key, value, attention_mask == 0, inside, scale, factor, softcap)
    return out.transpose(1, 2).contiguous(), None
